"""Tiny random models of every family, with values in all the places that transforms and exporters must get right.

Linears have a spread that matters next to the residual stream, norms are not all ones and biases not all zeros, so
that a weight, a gain or a bias that is lost or taken twice shows in the logits. The vocabulary is that of the embedded
tokenizer.
"""

import shutil
from pathlib import Path

import qkit_data
import torch
import transformers

VOCABULARY = 4096
_SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
_OPT = dict(vocab_size=VOCABULARY, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4)
_NEOX = {k: v for k, v in _SIZES.items() if k != "num_key_value_heads"}

# family: (config class, what its config is)
FAMILIES = {
    "llama": (transformers.LlamaConfig, _SIZES),
    "mistral": (transformers.MistralConfig, _SIZES),
    "qwen2": (transformers.Qwen2Config, _SIZES),
    "qwen3": (transformers.Qwen3Config, {**_SIZES, "head_dim": 16}),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {**_SIZES, "head_dim": 16, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": (transformers.Phi3Config, {**_SIZES, "pad_token_id": 0}),
    "opt": (transformers.OPTConfig, {**_OPT, "max_position_embeddings": 128, "word_embed_proj_dim": 64}),
    "gpt_neox": (transformers.GPTNeoXConfig, _NEOX),
    "mixtral": (transformers.MixtralConfig, {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {**_SIZES, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
}


def make(family: str, path: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **changes) -> Path:
    """A model of the family with config fields changed, saved by transformers into ``path`` with its tokenizer."""
    kind, fields = FAMILIES[family]
    torch.manual_seed(seed)
    config = kind(**{**fields, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".bias"):
                p.normal_(0, 0.2)
            elif p.dim() == 1:  # Gemma's norms multiply by 1 + weight
                p.normal_(0.0 if family == "gemma3" else 1.0, 0.2)
            elif "embed" not in name and "lm_head" not in name:
                p.normal_(0, p.shape[-1] ** -0.5)
            else:
                p.normal_(0, 0.5)
    model.tie_weights()
    model.to(dtype).save_pretrained(path)
    add_tokenizer(path)
    return path


def add_tokenizer(path: Path) -> None:
    """The embedded tokenizer, beside a model."""
    source = qkit_data.model_path("tiny-llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, path / name)


def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    """float32 [rows, length, vocabulary]."""
    with torch.inference_mode():
        return model(input_ids=tokens).logits.float()


def tokens(rows: int = 2, length: int = 32, seed: int = 1) -> torch.Tensor:
    """Random token ids, int64 [rows, length]."""
    return torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of ``wanted``."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())
