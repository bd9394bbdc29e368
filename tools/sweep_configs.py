"""Tiny random models of the classes that transformers has built in, as folders like those of the hub.

    save("causal", "qwen3_next", Path("folder"))
    save("encoders", "bert:masked", Path("folder"))

Every kind of block of the class is in its model, in fewer than seven layers. Linears have a spread that matters, norms are
not all ones and biases not all zeros, so that a weight, a gain or a bias that is lost or taken twice shows in the logits.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from sweep_changes import CHANGES
from sweep_shrink import tiny_fields
from transformers.models.auto import modeling_auto as tables

ROOT = Path(__file__).resolve().parent.parent
for _place in (ROOT, ROOT / "calib_data", ROOT / "kernels", ROOT / "tests"):
    if str(_place) not in sys.path:
        sys.path.insert(0, str(_place))

# The model types of popular embedding models, whose folders hold a class without a head.
_EMBEDDERS = (
    "albert bert roberta xlm-roberta mpnet distilbert electra deberta-v2 modernbert nomic_bert gte jina_embeddings_v3 eurobert "
    "bert-generation qwen2 qwen3 llama mistral gemma3_text gemma2 phi3 gpt2 opt qwen3_moe clip_text_model esm"
)
# kind: {task: (model types, the class of transformers that builds them)}
KINDS: dict[str, dict[str, tuple[list[str], Any]]] = {
    "causal": {"": (list(tables.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), transformers.AutoModelForCausalLM)},
    "image-text": {
        "": (list(tables.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES), transformers.AutoModelForImageTextToText)
    },
    "encoders": {
        "masked": (list(tables.MODEL_FOR_MASKED_LM_MAPPING_NAMES), transformers.AutoModelForMaskedLM),
        "sequence": (
            list(tables.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES), transformers.AutoModelForSequenceClassification
        ),
        "base": (_EMBEDDERS.split(), transformers.AutoModel),
        "encoder": (["t5", "mt5", "umt5"], transformers.AutoModelForTextEncoding),
        "seq2seq": (list(tables.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES), transformers.AutoModelForSeq2SeqLM),
        "speech": (list(tables.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES), transformers.AutoModelForSpeechSeq2Seq),
        "ctc": (list(tables.MODEL_FOR_CTC_MAPPING_NAMES), transformers.AutoModelForCTC),
    },
}  # fmt: skip


def names(kind: str) -> list[str]:
    """The classes of a kind: 'model_type', or 'model_type:task' where the kind has several."""
    tasks = KINDS[kind].items()
    return [f"{model_type}:{task}" if task else model_type for task, (types, _) in tasks for model_type in types]


def config(kind: str, name: str) -> Any:
    """The tiny config of a class. Raises whatever its config class raises."""
    model_type = name.partition(":")[0]
    made = transformers.CONFIG_MAPPING[model_type]
    changes = CHANGES.get(name, CHANGES.get(model_type, {}))
    if "" in changes:  # the class has no default config
        return made(**changes[""])
    return made(**tiny_fields(made().to_dict(), changes))


def build(kind: str, name: str, seed: int = 0) -> Any:
    """The model in float32 with random weights, in eval mode. Raises whatever its class raises."""
    torch.manual_seed(seed)
    builder = KINDS[kind][name.partition(":")[2]][1]
    model = builder.from_config(config(kind, name), dtype=torch.float32).eval()
    randomize(model)
    return model


@torch.no_grad()
def randomize(model: Any) -> None:
    """Values in all places: noise on what is drawn around a mean keeps norms that multiply by 1 + weight what they are."""
    for name, p in model.named_parameters():
        if not p.is_floating_point() or not p.numel():
            continue
        if p.dim() < 2:
            p.add_(torch.randn_like(p) * 0.1)
        elif any(word in name for word in ("embed", "lm_head", "wte", "wpe", "shared.weight")):
            p.normal_(0, 0.5)
        else:
            p.normal_(0, max(p[0].numel(), 16) ** -0.5 if p.dim() == 2 else p.shape[-1] ** -0.5)
    model.tie_weights()


def save(kind: str, name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A tiny random model, saved by transformers into ``folder`` as a hub has it, with the embedded tokenizer."""
    from tiny_models import add_tokenizer

    model = build(kind, name).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    add_tokenizer(folder)
    return folder
