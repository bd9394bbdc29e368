"""Models that are quantized already, made with the writers of those who store them so, or after their packing code where that
is no package here; each beside its plain copy, decoded by the same library or by a formula written out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

Tensors = dict[str, Tensor]
Encode = Callable[[str, Tensor], tuple[Tensors, Tensor]]  # (name, weight) -> its stored tensors, its decoded copy
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def is_linear(name: str) -> bool:
    return name.endswith("proj.weight")


def write(
    plain: Path,
    folder: Path,
    quantization: dict | None,
    encode: Encode,
    shards: int = 1,
    chosen: Callable[[str], bool] = is_linear,
) -> tuple[Path, Path]:
    """(the quantized model, its decoded copy) in two folders below ``folder``, both made from the model in ``plain``.

    shards: files that the tensors of the quantized one are dealt to, so that codes and scales lie in different ones
    """
    stored, decoded = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in sorted(load_file(plain / "model.safetensors").items()):
        if chosen(name):
            made, decoded[name] = encode(name, tensor)
            stored.update(made)
        else:
            stored[name] = decoded[name] = tensor
    source, copy = folder / "source", folder / "copy"
    for target, tensors, count in ((source, stored, shards), (copy, decoded, 1)):
        shutil.copytree(plain, target)
        (target / "model.safetensors").unlink()
        _save(target, {k: v.contiguous() for k, v in tensors.items()}, count)
    if quantization is not None:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return source, copy


def _save(folder: Path, tensors: Tensors, count: int) -> None:
    if count == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        dealt = {name: tensors[name] for name in sorted(tensors)[i::count]}
        save_file(dealt, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(dealt, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# ---- FP8 ---------------------------------------------------------------------------------------------------------


def fp8(
    plain: Path, folder: Path, block: tuple[int, int] | None = (32, 32), shards: int = 1, **config
) -> tuple[Path, Path]:
    """FP8 by transformers' own operation; block: None for one scale a weight."""
    asked = FineGrainedFP8Config(weight_block_size=block, **config)
    owner = SimpleNamespace(quantization_config=asked)

    def encode(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        made = Fp8Quantize(owner).convert({name: weight})
        scale = made[name + "_scale_inv"]
        return made, Fp8Dequantize(owner)._dequantize_one(made[name], scale, output_dtype=weight.dtype)

    return write(plain, folder, asked.to_dict(), encode, shards)


# ---- MXFP4 -------------------------------------------------------------------------------------------------------


def mxfp4(plain: Path, folder: Path, shards: int = 1) -> tuple[Path, Path]:
    """MXFP4 experts as gpt-oss has them, decoded by transformers. Its own writer needs a kernel from the hub; here the scale
    of a block is the power of two under its largest value less two, and codes are the nearest."""
    from transformers import Mxfp4Config
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])

    def encode(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        tiles = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))
        exponent = torch.floor(torch.log2(tiles.abs().amax(-1).clamp_min(2.0**-100))) - 2
        values = tiles / torch.exp2(exponent)[..., None]
        nearest = (values.abs()[..., None] - grid).abs().argmin(-1).to(torch.uint8)
        codes = nearest | (torch.signbit(values).to(torch.uint8) << 3)
        blocks = codes[..., 0::2] | (codes[..., 1::2] << 4)
        scales = (exponent + 127).to(torch.uint8)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}, convert_moe_packed_tensors(blocks, scales)

    def chosen(name: str) -> bool:
        return name.endswith(("experts.gate_up_proj", "experts.down_proj"))

    return write(plain, folder, Mxfp4Config().to_dict(), encode, shards, chosen)


# ---- compressed-tensors ------------------------------------------------------------------------------------------


def compressed(plain: Path, folder: Path, weights: dict, form: str, shards: int = 1) -> tuple[Path, Path]:
    """compressed-tensors by its own compressor. weights: QuantizationArgs; form: the name of the format."""
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    compressor = BaseCompressor.get_value_from_registry(form)

    def encode(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        stem = name.removesuffix("weight")
        made = compressor.compress({"weight": weight, **_parameters(weight, args)}, scheme)
        decoded = compressor.decompress(dict(made), scheme)["weight"].to(weight.dtype)
        return {stem + leaf: t for leaf, t in made.items() if t is not None}, decoded

    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=form, quantization_status="compressed", ignore=["lm_head"]
    )
    return write(plain, folder, config.model_dump(mode="json"), encode, shards)


def _parameters(weight: Tensor, args: QuantizationArgs) -> Tensors:
    """Scales and zero points by the library's own formulas."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    rows, columns = weight.shape
    width = args.group_size or columns
    tiles = weight.float().reshape(1, -1) if args.strategy == "tensor" else weight.float().reshape(rows, -1, width)
    low, high = tiles.amin(-1), tiles.amax(-1)
    extra = {}
    if args.strategy == "tensor_group":
        extra["weight_global_scale"] = generate_gparam(weight.float().amin(), weight.float().amax()).reshape(1)
    scale, zero = calculate_qparams(low, high, args, extra.get("weight_global_scale"))
    extra["weight_scale"] = scale if args.strategy == "tensor_group" else scale.to(args.scale_dtype or weight.dtype)
    return extra if args.symmetric else {**extra, "weight_zero_point": zero}


# ---- GPTQ and AWQ ------------------------------------------------------------------------------------------------


def stream(values: Tensor, bits: int) -> Tensor:
    """int32 words along axis 0 from unsigned values [n, m]: the bit stream of AutoGPTQ's packing, for every width."""
    columns = []
    for column in values.T.tolist():
        number = sum(int(v) << (bits * i) for i, v in enumerate(column))
        columns.append([(number >> (32 * w)) & 0xFFFFFFFF for w in range(len(column) * bits // 32)])
    words = torch.tensor(columns, dtype=torch.int64).T
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()


def _integers(weight: Tensor, bits: int, group_of: Tensor, sym: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [out, in], zero points [out, groups] (at least 1) and fp16 scales [out, groups] by the range of each group."""
    groups = int(group_of.max()) + 1
    w, top = weight.float(), 2**bits - 1
    low = torch.stack([w[:, group_of == g].amin(1) for g in range(groups)], 1).clamp_max(0)
    high = torch.stack([w[:, group_of == g].amax(1) for g in range(groups)], 1).clamp_min(0)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    scale = ((high - low) / top).clamp_min(1e-4).half()
    zero = (-low / scale.float()).round().clamp(1, top).long()
    zero = torch.full_like(zero, 2 ** (bits - 1)) if sym else zero
    codes = ((w / scale.float()[:, group_of]).round() + zero[:, group_of]).clamp(0, top).long()
    return codes, zero, scale


def gptq(
    plain: Path,
    folder: Path,
    bits: int = 4,
    group: int = 32,
    act_order: bool = False,
    version: str = "gptq",
    shards: int = 1,
    sym: bool = False,
) -> tuple[Path, Path]:
    """GPTQ after the packing of AutoGPTQ. act_order: columns name their groups in a shuffled order."""

    def encode(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        columns = weight.shape[1]
        group_of = torch.arange(columns) // group
        if act_order:
            group_of = group_of[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
        codes, zero, scale = _integers(weight, bits, group_of, sym)
        decoded = (codes - zero[:, group_of]).half() * scale[:, group_of]
        stem = name.removesuffix("weight")
        stored_zero = zero - 1 if version == "gptq" else zero
        made = {
            "qweight": stream(codes.T, bits),
            "qzeros": stream(stored_zero, bits).T.contiguous(),
            "scales": scale.T.contiguous(),
            "g_idx": group_of.int(),
        }
        return {stem + leaf: t for leaf, t in made.items()}, decoded.to(weight.dtype)

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "sym": sym}
    return write(plain, folder, {**config, "checkpoint_format": version}, encode, shards)


def awq(plain: Path, folder: Path, group: int = 32, shards: int = 1) -> tuple[Path, Path]:
    """AWQ of version gemm, after the packing of AutoAWQ."""

    def packed(values: Tensor) -> Tensor:  # [n, 8 m] -> [n, m]
        lanes = values.reshape(values.shape[0], -1, 8)[..., list(AWQ_ORDER)]
        words = sum(lanes[..., i] << (4 * i) for i in range(8))
        return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()

    def encode(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        group_of = torch.arange(weight.shape[1]) // group
        codes, zero, scale = _integers(weight, 4, group_of)
        decoded = (codes - zero[:, group_of]).half() * scale[:, group_of]
        stem = name.removesuffix("weight")
        made = {"qweight": packed(codes.T), "qzeros": packed(zero.T), "scales": scale.T.contiguous()}
        return {stem + leaf: t for leaf, t in made.items()}, decoded.to(weight.dtype)

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return write(plain, folder, config, encode, shards)
