"""Declarations of the vision-language families: a vision tower and a projector before a language model.

The blocks are those of the language model; the tower and the projector are targets of their own. Checkpoints of these
families name their tensors in several ways; transformers' own renaming gives the module of each.
"""

from __future__ import annotations

from qkit.families import Family, Keys, Tower
from qkit.families.blocks import Group
from qkit.families.llm import LLAMA

# Language models whose blocks are those of a Llama, by the model_type of text_config.
TEXT_TYPES = (*LLAMA.model_types, "qwen2_vl_text", "qwen2_5_vl_text")

# Blocks of SigLIP, CLIP and Idefics; InternVL; Qwen2-VL and Qwen2.5-VL; Pixtral. Attention hands its values on linearly, so
# that their scale can be folded; a GELU does not.
_TOWER_GROUPS = (
    Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), source="layer_norm1"),
    Group(("self_attn.out_proj",), source="self_attn.v_proj"),
    Group(("mlp.fc1",), source="layer_norm2"),
    Group(("attention.q_proj", "attention.k_proj", "attention.v_proj"), source="layernorm_before"),
    Group(("attention.projection_layer",), source="attention.v_proj"),
    Group(("mlp.fc1",), source="layernorm_after"),
    Group(("attn.qkv",), source="norm1"),
    Group(("attn.proj",)),
    Group(("mlp.fc1",), source="norm2"),
    Group(("mlp.gate_proj", "mlp.up_proj"), source="norm2"),
    Group(("mlp.down_proj",), source="mlp.up_proj"),
    Group(("attention.q_proj", "attention.k_proj", "attention.v_proj"), source="attention_norm"),
    Group(("attention.o_proj",), source="attention.v_proj"),
    Group(("feed_forward.gate_proj", "feed_forward.up_proj"), source="ffn_norm"),
    Group(("feed_forward.down_proj",), source="feed_forward.up_proj"),
)
TOWERS = (
    Tower(
        "vision",
        (
            "model.vision_tower.encoder.layers",
            "model.vision_tower.encoder.layer",
            "model.vision_tower.transformer.layers",
            "model.vision_model.encoder.layers",
            "model.visual.blocks",
        ),
        _TOWER_GROUPS,
    ),
    Tower("projector", ("model.multi_modal_projector", "model.visual.merger", "model.connector")),
)

LLAVA = Family(
    name="llava",
    model_types=("llava", "llava_next", "llava_onevision", "internvl", "qwen2_vl", "qwen2_5_vl"),
    blocks=("model.language_model.layers",),
    groups=LLAMA.groups,
    embeddings="model.language_model.embed_tokens",
    final_norm="model.language_model.norm",
    stream=LLAMA.stream,
    keys=Keys(),
    towers=TOWERS,
    text_types=TEXT_TYPES,
    note="LLaVA 1.5, LLaVA-NeXT, LLaVA-OneVision, InternVL, Qwen2-VL, Qwen2.5-VL",
)
IDEFICS = Family(
    name="idefics",
    model_types=("idefics3", "smolvlm"),
    blocks=("model.text_model.layers",),
    groups=LLAMA.groups,
    embeddings="model.text_model.embed_tokens",
    final_norm="model.text_model.norm",
    stream=LLAMA.stream,
    keys=Keys(),
    towers=TOWERS,
    text_types=TEXT_TYPES,
    note="Idefics3, SmolVLM",
)

FAMILIES = (LLAVA, IDEFICS)
