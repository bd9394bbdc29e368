"""Tiny random models of the classes that transformers has built in, as folders like those of the hub.

    save("causal", "qwen3_next", Path("folder"))

Every kind of block of the class is in its model, in fewer than six layers. Linears have a spread that matters, norms are not
all ones and biases not all zeros, so that a weight, a gain or a bias that is lost or taken twice shows in the logits.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from sweep_changes import CAUSAL
from sweep_shrink import VOCABULARY, tiny_fields
from transformers.models.auto import modeling_auto as tables

ROOT = Path(__file__).resolve().parent.parent
for _place in (ROOT, ROOT / "calib_data", ROOT / "kernels", ROOT / "tests"):
    if str(_place) not in sys.path:
        sys.path.insert(0, str(_place))

# kind: (the classes that transformers has for it, the class that builds them, what their configs need)
KINDS: dict[str, tuple[dict[str, Any], Any, dict[str, dict[str, Any]]]] = {
    "causal": (dict(tables.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), transformers.AutoModelForCausalLM, CAUSAL),
}


def model_types(kind: str) -> list[str]:
    """The model types of a kind, in the order of transformers' own table."""
    return list(KINDS[kind][0])


def config(kind: str, model_type: str) -> Any:
    """The tiny config of a class. Raises whatever its config class raises."""
    made, changes = transformers.CONFIG_MAPPING[model_type], KINDS[kind][2].get(model_type, {})
    if "" in changes:  # the class has no default config
        return made(**changes[""])
    return made(**tiny_fields(made().to_dict(), changes))


def build(kind: str, model_type: str, seed: int = 0) -> Any:
    """The model in float32 with random weights, in eval mode. Raises whatever its class raises."""
    torch.manual_seed(seed)
    model = KINDS[kind][1].from_config(config(kind, model_type), dtype=torch.float32).eval()
    randomize(model)
    return model


@torch.no_grad()
def randomize(model: Any) -> None:
    """Values in all places: what is drawn around its own mean keeps norms that multiply by 1 + weight what they are."""
    for name, p in model.named_parameters():
        if not p.is_floating_point():
            continue
        if p.dim() < 2:
            p.add_(torch.randn_like(p) * 0.1)
        elif any(word in name for word in ("embed", "lm_head", "wte", "wpe", "shared.weight")):
            p.normal_(0, 0.5)
        else:
            p.normal_(0, max(p[0].numel(), 16) ** -0.5 if p.dim() == 2 else p.shape[-1] ** -0.5)
    model.tie_weights()


def inputs(kind: str, model: Any, rows: int = 2, length: int = 48, seed: int = 1) -> dict[str, Any]:
    """What the model is called with: random tokens, int64 [rows, length], but where the class asks for more."""
    chance = torch.Generator().manual_seed(seed)
    if hasattr(model.config, "backbone_hidden_size"):  # a draft model: it reads states of the model that it helps
        return _draft_inputs(model.config, rows, length, chance)
    return {"input_ids": torch.randint(5, VOCABULARY, (rows, length), generator=chance)}


def _draft_inputs(config: Any, rows: int, length: int, chance: torch.Generator) -> dict[str, Any]:
    """One token to draft after ``length`` that are known, as the class is used; it fails on more in transformers 5.24."""
    text = config.get_text_config()
    states = torch.randn(rows, 1, 2 * config.backbone_hidden_size, generator=chance)
    shared = {}
    for layer, kind in enumerate(text.layer_types):
        own = text.per_layer_config[layer]
        shape = (2, rows, own.num_key_value_heads, length, own.head_dim)
        shared[kind] = tuple(torch.randn(shape, generator=chance))
    return {"inputs_embeds": states, "shared_kv_states": shared, "position_ids": torch.tensor([[length]])}


def save(kind: str, model_type: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A tiny random model, saved by transformers into ``folder`` as a hub has it, with the embedded tokenizer."""
    from tiny_models import add_tokenizer

    model = build(kind, model_type).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def result(output: Any) -> torch.Tensor:
    """What is compared of a call of a model, float32: its logits, or the last hidden state of a model without a head."""
    found = output.logits if getattr(output, "logits", None) is not None else output[0]
    return found.float()
