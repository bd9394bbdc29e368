"""Declarations of the vision-language families: a vision tower and a projector before a language model.

The blocks are those of the language model; the tower and the projector are modules outside of them. Checkpoints of these
families name their tensors in several ways; transformers' own renaming says which module each belongs to.
"""

from __future__ import annotations

from qkit.families import Family, Keys
from qkit.families.llm import LLAMA

# Language models whose blocks are those of a Llama, by the model_type of text_config.
TEXT_TYPES = (*LLAMA.model_types, "qwen2_vl_text", "qwen2_5_vl_text")

LLAVA = Family(
    "llava",
    ("llava", "llava_next", "llava_onevision", "internvl", "qwen2_vl", "qwen2_5_vl"),
    blocks="model.language_model.layers",
    groups=LLAMA.groups,
    embeddings="model.language_model.embed_tokens",
    final_norm="model.language_model.norm",
    keys=Keys(),
    text_types=TEXT_TYPES,
    note="LLaVA 1.5, LLaVA-NeXT, LLaVA-OneVision, InternVL, Qwen2-VL, Qwen2.5-VL",
)
IDEFICS = Family(
    "idefics",
    ("idefics3", "smolvlm"),
    blocks="model.text_model.layers",
    groups=LLAMA.groups,
    embeddings="model.text_model.embed_tokens",
    final_norm="model.text_model.norm",
    keys=Keys(),
    text_types=TEXT_TYPES,
    note="Idefics3, SmolVLM",
)

FAMILIES = (LLAVA, IDEFICS)
