"""The reference for a packed checkpoint: the original model with weights as the compressed-tensors package reads them,
and activations rounded as the formats define it. Shares no code with qkit."""

import json
import re
from pathlib import Path

import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors import safe_open
from torch import Tensor, nn


def decompress(tensors: dict[str, Tensor], scheme: QuantizationScheme) -> Tensor:
    """The float32 weight [out, in] of a linear's stored tensors, computed by compressed-tensors in float32."""
    if scheme.format == "nvfp4-pack-quantized":
        rows, half = tensors["weight_packed"].shape
        values = unpack_fp4_from_uint8(tensors["weight_packed"], rows, 2 * half).float()
        args = {"args": scheme.weights, "dtype": torch.float32, "global_scale": tensors["weight_global_scale"]}
        return dequantize(values, tensors["weight_scale"].float(), **args)
    scale = tensors["weight_scale"]
    wide = {**tensors, "weight_scale": scale.float() if scale.is_floating_point() else scale}
    return BaseCompressor.get_value_from_registry(scheme.format).decompress(wide, scheme)["weight"].float()


def round_e2m1(x: Tensor) -> Tensor:
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    index = torch.bucketize(x.abs(), middles)  # a value on a middle goes to the lower neighbour
    on_middle = (x.abs()[..., None] == middles).any(-1)
    index = index + (on_middle & (index % 2 == 1)).long()  # to the even code
    return grid[index] * x.sign()


def round_activations(x: Tensor, scheme: QuantizationScheme, tensors: dict[str, Tensor]) -> Tensor:
    """Quantize and dequantize x [..., channels] as the input of a linear under the scheme, in float32."""
    return x if scheme.input_activations is None else _rounded(x.float(), scheme, tensors).to(x.dtype)


def _rounded(x: Tensor, scheme: QuantizationScheme, tensors: dict[str, Tensor]) -> Tensor:
    args = scheme.input_activations
    if args.strategy == "tensor":
        scale = tensors["input_scale"].float()
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    width = x.shape[-1] if args.strategy == "token" else args.group_size
    tiles = x.unflatten(-1, (-1, width))
    amax = tiles.abs().amax(-1, keepdim=True)
    if args.type == "int":
        scale = amax / 127.5
        scale = torch.where(scale == 0, 1.0, scale)
        return ((tiles / scale).round().clamp(-128, 127) * scale).flatten(-2)
    if args.num_bits == 8:
        scale = amax / 448
        if args.scale_dtype == torch.uint8:
            scale = power_of_two(amax, 8)
        scale = torch.where(scale == 0, 1.0, scale)
        return ((tiles / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).flatten(-2)
    if args.strategy == "tensor_group":
        whole = tensors["input_global_scale"]
        scale = (whole * (amax / 6)).clamp_max(448).to(torch.float8_e4m3fn).float()
        scale = torch.where(scale == 0, 0.125, scale) / whole
    else:
        scale = power_of_two(amax, 2)
    return (round_e2m1((tiles / scale).clamp(-6, 6)) * scale).flatten(-2)


def power_of_two(amax: Tensor, offset: int) -> Tensor:
    """MX scale: the exponent of amax, one higher from a mantissa of 1.75 on, less the exponent of the largest code."""
    exponent = torch.floor(torch.log2(amax.double()))
    exponent = exponent + (amax.double() / torch.exp2(exponent) >= 1.75)
    return torch.where(amax == 0, 1.0, torch.exp2(exponent - offset)).float()


class SlowExperts(nn.Module):
    """Routed experts one by one. weights: {(expert, part): (weight, rounding of its input)}"""

    def __init__(self, act, weights):
        super().__init__()
        self.act, self.weights = act, weights

    def forward(self, hidden, top_k_index, top_k_weights):
        result = torch.zeros_like(hidden)
        for token in range(len(hidden)):
            for e, share in zip(top_k_index[token].tolist(), top_k_weights[token], strict=True):
                x = hidden[token : token + 1]
                gate, up = (self.product(x, e, part) for part in ("gate", "up"))
                result[token] += share * self.product(self.act(gate) * up, e, "down")[0]
        return result

    def product(self, x, e, part):
        weight, rounding = self.weights[e, part]
        return rounding(x) @ weight.T.to(x.dtype)


_PARTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}


def reference_model(packed: Path, original: Path):
    """float32 transformers model of ``original`` that computes what the checkpoint in ``packed`` stands for."""
    config = json.loads((packed / "config.json").read_text())
    written = QuantizationConfig.model_validate(config["quantization_config"])
    by_linear: dict[str, dict[str, Tensor]] = {}
    plain: dict[str, Tensor] = {}
    for shard in sorted(packed.glob("*.safetensors")):
        with safe_open(shard, "pt") as f:
            for name in f.keys():
                by_linear.setdefault(name.rpartition(".")[0], {})[name.rpartition(".")[2]] = f.get_tensor(name)
    changes = {"tie_word_embeddings": False} if config.get("tie_word_embeddings") is False else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32, **changes).eval()
    modules, experts = dict(model.named_modules()), {}
    for name, tensors in by_linear.items():
        scheme = scheme_of(name, written) if "weight_scale" in tensors else None
        where = name.replace("block_sparse_moe.", "mlp.").replace("embed_out", "lm_head")
        if scheme is None:
            for leaf, value in tensors.items():
                plain[f"{where}.{leaf}"] = value
            continue
        rounding = lambda x, s=scheme, t=tensors: round_activations(x, s, t)  # noqa: E731
        if ".experts." in name:
            owner, _, rest = where.partition(".experts.")
            expert, _, part = rest.partition(".")
            experts.setdefault(f"{owner}.experts", {})[int(expert), _PARTS[part]] = (
                decompress(tensors, scheme),
                rounding,
            )
            continue
        module = modules[where]
        module.weight.data = decompress(tensors, scheme)
        if "bias" in tensors:
            module.bias.data = tensors["bias"].float()
        module.register_forward_pre_hook(lambda _, args, r=rounding: (r(args[0]), *args[1:]))
    for owner, weights in experts.items():
        model.set_submodule(owner, SlowExperts(modules[owner].act_fn, weights))
    known = dict(model.named_parameters())
    for name, value in plain.items():
        if name in known:
            known[name].data = value.float()
    return model


def scheme_of(name: str, written: QuantizationConfig) -> QuantizationScheme:
    groups = list(written.config_groups.values())
    exact = [g for g in groups if any(name == t or (t[:3] == "re:" and re.match(t[3:], name)) for t in g.targets)]
    return (exact or [g for g in groups if "Linear" in g.targets])[0]
