"""The defects that are seeded, by the way in which a file is stored: see ``seeded_files``."""

from pathlib import Path

import torch
from seeded_files import (
    DOWN,
    FIRST,
    GATE,
    UP,
    K,
    O,
    Q,
    Seed,
    V,
    at,
    both,
    config,
    cut,
    drop,
    field,
    misplaced,
    plain,
    put,
    remove,
    rename,
    scale_in_order,
    split,
    swap,
    tensors,
)
from torch import Tensor

CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def compressed_seeds(original: Path) -> list[Seed]:
    """compressed-tensors, integers in words with groups (w4a16)."""
    group = ("quantization_config", "config_groups", "group_0")
    return [
        Seed("no scale", drop(f"{Q}.weight_scale"), ("lost tensors",), Q),
        Seed("no shape", drop(f"{Q}.weight_shape"), ("lost tensors",), Q),
        Seed("no codes", drop(f"{DOWN}.weight_packed"), ("lost tensors",), DOWN),
        Seed("a norm is lost", drop(f"{FIRST}input_layernorm.weight"), ("lost tensors",), "input_layernorm"),
        Seed("NaN in a scale", put(f"{UP}.weight_scale", at(float("nan"), 3)), ("scales",), UP),
        Seed("infinite scale", put(f"{UP}.weight_scale", at(float("inf"), 3)), ("scales",), UP),
        Seed("zero scale", put(f"{UP}.weight_scale", at(0.0, 5)), ("scales",), UP),
        # Of a file whose scales have signs, as qkit writes them, only the sums of the record tell.
        Seed("negative scale", put(f"{UP}.weight_scale", at(-0.01, 5)), ("scales", "changed bytes"), UP),
        Seed("all scales zero", put(f"{O}.weight_scale", torch.zeros_like), ("scales",), O),
        Seed(
            "a scale 5000 times too large",
            put(f"{V}.weight_scale", lambda t: at(5000 * float(t.median()), 7)(t)),
            ("scales",),
            V,
        ),
        Seed("scales inverted", put(f"{O}.weight_scale", lambda t: 1 / t), ("inverted scales", "magnitude"), O),
        Seed("scales a hundred times too large", put(f"{DOWN}.weight_scale", lambda t: t * 100), ("magnitude",), DOWN),
        Seed("half of the codes", put(f"{GATE}.weight_packed", scale_in_order(3)), ("codes",), GATE),
        Seed("a quarter of the codes", put(f"{DOWN}.weight_packed", scale_in_order(2)), ("codes",), DOWN),
        Seed("group size of the config", field(*group, "weights", "group_size", 16), ("config",), Q),
        Seed("bits of the config", field(*group, "weights", "num_bits", 8), ("config",), Q),
        Seed("format of the config", field(*group, "format", "int-quantized"), ("config",), Q),
        Seed("asymmetric config", field(*group, "weights", "symmetric", False), ("lost tensors",), Q),
        Seed(
            "ignore lists a packed layer", field("quantization_config", "ignore", ["lm_head", GATE]), ("config",), GATE
        ),
        Seed("targets match too little", field(*group, "targets", ["re:.*self_attn.*"]), ("config",), DOWN),
        Seed(
            "one of q, k, v is plain",
            both(plain(V, original), field("quantization_config", "ignore", ["lm_head", V])),
            ("fused layers",),
            V,
        ),
        Seed("a plain layer that nothing lists", plain(DOWN, original), ("config",), DOWN),
        Seed("no quantization_config", config(lambda c: c.pop("quantization_config")), ("config",), "config.json"),
        Seed("weight_shape", put(f"{K}.weight_shape", lambda t: t + 1), ("config",), K),
        Seed(
            "hidden_size of the config",
            config(lambda c: c.update(hidden_size=2 * c["hidden_size"])),
            ("shapes",),
            "model.",
        ),
        Seed(
            "vocab_size of the config",
            config(lambda c: c.update(vocab_size=c["vocab_size"] + 64)),
            ("vocabulary", "shapes"),
            "embed",
        ),
        Seed(
            "more layers in the config",
            config(lambda c: c.update(num_hidden_layers=c["num_hidden_layers"] + 1)),
            ("config", "lost tensors"),
            "",
        ),
        Seed("lost MTP layer", field("num_nextn_predict_layers", 1), ("lost MTP layers",), "layers."),
        Seed("renamed tensor", rename("model.norm.weight", "model.final_norm.weight"), ("lost tensors",), "model.norm"),
        Seed(
            "KV scales are promised",
            field("quantization_config", "kv_cache_scheme", CACHE),
            ("KV scales",),
            f"{FIRST}self_attn",
        ),
        Seed(
            "KV scales that nothing asks for",
            tensors(lambda t: t.update({f"{FIRST}self_attn.k_scale": torch.tensor([0.1])})),
            ("KV scales",),
            f"{FIRST}self_attn",
        ),
        Seed("NaN in a norm", put("model.norm.weight", at(float("nan"))), ("plain tensors",), "model.norm"),
        Seed(
            "embeddings of zeros", put("model.embed_tokens.weight", torch.zeros_like), ("zero layers",), "embed_tokens"
        ),
        Seed("cut file", cut(), ("files",), "model.safetensors"),
        Seed(
            "a shard is missing",
            lambda f: (split(f), (f / "model-00002-of-00002.safetensors").unlink()),
            ("files",),
            "00002-of",
        ),
        Seed("the index names another shard", misplaced, ("files",), "weight"),
        Seed(
            "broken chat template",
            lambda f: (f / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }"),
            ("chat template",),
            "chat_template",
        ),
        Seed(
            "tokens above the vocabulary",
            config(
                lambda c: c["added_tokens"].append({"id": 999999, "content": "<x>", "special": True}), "tokenizer.json"
            ),
            ("vocabulary",),
            "tokenizer.json",
        ),
        Seed("end token above the vocabulary", field("eos_token_id", 10**6), ("vocabulary",), "eos_token_id"),
        # against the original
        Seed("exchanged layers", swap(GATE, UP), ("swapped layers",), "mlp", True),
        Seed(
            "rows in another order",
            put(f"{O}.weight_packed", lambda t: t.flip(0)),
            ("permuted layers", "drift"),
            O,
            True,
        ),
        Seed("weights twice as large", put(f"{DOWN}.weight_scale", lambda t: t * 2), ("drift",), DOWN, True),
        Seed(
            "noise",
            put(
                f"{UP}.weight_scale",
                lambda t: t * (1 + 0.8 * torch.rand(t.shape, generator=torch.Generator().manual_seed(0))).to(t.dtype),
            ),
            ("drift",),
            UP,
            True,
        ),
        Seed(
            "a norm that changed",
            put(f"{FIRST}input_layernorm.weight", lambda t: t * 1.5),
            ("norms",),
            "input_layernorm",
            True,
        ),
        Seed(
            "embeddings that changed",
            put("model.embed_tokens.weight", lambda t: t * 1.1),
            ("drift",),
            "embed_tokens",
            True,
        ),
        Seed(
            "another chat template",
            lambda f: (f / "chat_template.jinja").write_text("{{ messages[0].content }}"),
            ("chat template",),
            "chat_template",
            True,
        ),
        Seed(
            "generation config",
            field("temperature", 0.123, file="generation_config.json"),
            ("generation config",),
            "temperature",
            True,
        ),
        Seed(
            "no generation config", remove("generation_config.json"), ("generation config",), "generation_config", True
        ),
        Seed("tokenizer is lost", remove("tokenizer.json"), ("tokenizer",), "tokenizer.json", True),
        Seed(
            "another special token",
            field("eos_token", "<other>", file="tokenizer_config.json"),
            ("special tokens",),
            "eos_token",
            True,
        ),
        Seed(
            "another rope_theta",
            field("rope_parameters", {"rope_theta": 123.0, "rope_type": "default"}),
            ("config",),
            "rope",
            True,
        ),
    ]


def cache_seeds(
    scale: str = "self_attn.k_scale", both_names: tuple[str, str] = ("self_attn.k_scale", "self_attn.v_scale")
) -> list[Seed]:
    """Files with scales of a KV cache. scale: the end of a name of one"""

    def ones(t: dict[str, Tensor]) -> None:
        for name in [n for n in t if n.endswith(both_names)]:
            t[name] = torch.ones_like(t[name])

    def none(t: dict[str, Tensor]) -> None:
        for name in [n for n in t if n.endswith(both_names)]:
            del t[name]

    return [
        Seed("KV scales are all 1", tensors(ones), ("KV scales",), "self_attn"),
        Seed("no KV scale is there", tensors(none), ("KV scales",), "self_attn"),
        Seed("one KV scale is lost", drop(f"{FIRST}{scale}"), ("KV scales",), f"{FIRST}self_attn"),
        Seed("a KV scale is zero", put(f"{FIRST}{scale}", torch.zeros_like), ("KV scales",), f"{FIRST}self_attn"),
        Seed(
            "a KV scale is NaN", put(f"{FIRST}{scale}", lambda t: t * float("nan")), ("KV scales",), f"{FIRST}self_attn"
        ),
        Seed(
            "a KV scale under another name",
            rename(f"{FIRST}{scale}", f"{FIRST}self_attn.key_scaling_factor"),
            ("KV scales", "unused tensors"),
            f"{FIRST}self_attn",
        ),
    ]


def nvfp4_seeds() -> list[Seed]:
    """compressed-tensors NVFP4."""
    return [
        Seed("the global scale is inverted", put(f"{O}.weight_global_scale", lambda t: 1 / t), ("inverted scales",), O),
        Seed("no global scale", drop(f"{DOWN}.weight_global_scale"), ("lost tensors",), DOWN),
        Seed(
            "q, k, v have several global scales", put(f"{Q}.weight_global_scale", lambda t: t * 2), ("fused layers",), Q
        ),
        Seed("block scales of zero", put(f"{DOWN}.weight_scale", at(0.0, 2)), ("scales",), DOWN),
        Seed(
            "infinite global scale", put(f"{DOWN}.weight_global_scale", lambda t: t * float("inf")), ("scales",), DOWN
        ),
        Seed("codes without signs", put(f"{DOWN}.weight_packed", lambda t: t & 0x77), ("codes",), DOWN),
    ]


def modelopt_seeds(original: Path) -> list[Seed]:
    """ModelOpt NVFP4."""
    return [
        Seed("weight_scale_2 is inverted", put(f"{O}.weight_scale_2", lambda t: 1 / t), ("inverted scales",), O),
        Seed("no weight_scale_2", drop(f"{DOWN}.weight_scale_2"), ("lost tensors",), DOWN),
        Seed(
            "an excluded layer is quantized",
            config(lambda c: c["quantization_config"].setdefault("ignore", []).append(GATE)),
            ("config",),
            GATE,
        ),
        Seed("a plain layer that nothing lists", plain(DOWN, original), ("config",), DOWN),
        Seed(
            "two configs that differ",
            field("quantization", "quant_algo", "FP8", file="hf_quant_config.json"),
            ("config",),
            "hf_quant_config",
        ),
    ]


def gptq_seeds(original: Path, bits: int = 4) -> list[Seed]:
    """GPTQ, symmetric, in words."""
    quantization = "quantization_config"
    return [
        Seed("no zero points", drop(f"{Q}.qzeros"), ("lost tensors",), Q),
        Seed("bits of the config", field(quantization, "bits", 8 if bits != 8 else 4), ("config",), Q),
        Seed("group size of the config", field(quantization, "group_size", 64), ("config",), Q),
        Seed(
            "zero points of another version", field(quantization, "checkpoint_format", "gptq_v2"), ("zero points",), Q
        ),
        Seed("zero points that are not half", put(f"{UP}.qzeros", lambda t: t ^ 3), ("zero points",), UP),
        Seed(
            "desc_act without g_idx",
            both(
                field(quantization, "desc_act", True),
                tensors(lambda t: [t.pop(n) for n in [*t] if n.endswith("g_idx")]),
            ),
            ("config",),
            Q,
        ),
        Seed("scales of NaN", put(f"{DOWN}.scales", at(float("nan"))), ("scales",), DOWN),
        Seed(
            "scales inverted",
            put(f"{O}.scales", lambda t: (1 / t.float()).to(t.dtype)),
            ("inverted scales", "magnitude"),
            O,
        ),
        Seed("a plain layer that nothing lists", plain(DOWN, original), ("config",), DOWN),
        Seed("exchanged layers", swap(GATE, UP), ("swapped layers",), "mlp", True),
    ]


def ordered_seeds() -> list[Seed]:
    """GPTQ with an order of columns."""
    quantization = "quantization_config"
    return [
        Seed("g_idx against desc_act", field(quantization, "desc_act", False), ("config",), Q),
        Seed("g_idx names groups that are not there", put(f"{Q}.g_idx", lambda t: t + 5), ("zero points",), Q),
    ]


def awq_seeds() -> list[Seed]:
    """AWQ."""
    quantization = "quantization_config"
    return [
        Seed(
            "modules_to_not_convert names a quantized layer",
            field(quantization, "modules_to_not_convert", [GATE]),
            ("config",),
            GATE,
        ),
        Seed("group size of the config", field(quantization, "group_size", 128), ("config",), Q),
        Seed("no scales", drop(f"{V}.scales"), ("lost tensors",), V),
        Seed("zero scale", put(f"{V}.scales", at(0.0, 4)), ("scales",), V),
        Seed("half of the codes", put(f"{DOWN}.qweight", scale_in_order(3)), ("codes",), DOWN),
    ]


def fp8_seeds(original: Path) -> list[Seed]:
    """FP8 in blocks (quant_method fp8)."""
    quantization, scale = "quantization_config", "weight_scale_inv"
    return [
        Seed("inverted block scales", put(f"{O}.{scale}", lambda t: 1 / t), ("inverted scales", "magnitude"), O),
        Seed("no scale", drop(f"{UP}.{scale}"), ("lost tensors",), UP),
        Seed("block size of the config", field(quantization, "weight_block_size", [16, 16]), ("config",), Q),
        Seed("negative block scale", put(f"{UP}.{scale}", at(-1.0)), ("scales",), UP),
        Seed(
            "a layer of zeros",
            put(f"{UP}.weight", lambda t: torch.zeros_like(t.float()).to(t.dtype)),
            ("zero layers",),
            UP,
        ),
        Seed("NaN among codes", put(f"{UP}.weight", at(float("nan"), 9)), ("scales",), UP),
        Seed("a plain layer that nothing lists", plain(DOWN, original), ("config",), DOWN),
        Seed(
            "k_proj is plain",
            both(plain(K, original), field(quantization, "modules_to_not_convert", [K])),
            ("fused layers",),
            K,
        ),
    ]


def kernel_seeds() -> list[Seed]:
    """A file in groups of 96."""
    return [Seed("groups that no kernel takes", lambda folder: None, ("groups", "engine"), Q)]


def engine_seeds() -> list[Seed]:
    """Asymmetric words, which transformers does not load."""
    return [Seed("not for the engine that is asked", lambda folder: None, ("engine",), Q, engine="transformers")]
