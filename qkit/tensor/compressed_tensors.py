"""Writes and reads the compressed-tensors format (0.20).

Per linear, next to ``bias``:
  pack-quantized         weight_packed int32, weight_scale, weight_shape int64 [2], weight_zero_point (asymmetric,
                         packed along the output dimension)
  int-quantized          weight int8, weight_scale, weight_zero_point int8 (asymmetric)
  float-quantized        weight float8_e4m3fn, weight_scale; naive-quantized where activations are not quantized
  nvfp4-pack-quantized   weight_packed uint8, weight_scale float8_e4m3fn, weight_global_scale float32 [1]
  mxfp4-pack-quantized   weight_packed uint8, weight_scale uint8;   mxfp8-quantized  weight float8, weight_scale uint8
  activations            input_scale [1] (static), input_global_scale float32 [1] (NVFP4)
Per attention module     k_scale, v_scale [1] or [heads, 1, 1], or k_global_scale, v_global_scale [1], with a kv_cache_scheme

INT8 weights with INT8 activations are int-quantized. All other integers are pack-quantized, including W4A8: engines have 4-bit
kernels for this layout (the library by itself would choose one byte per weight). The configuration is built with the library's
own classes, so the library accepts it.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from qkit.errors import Unsupported
from qkit.system.patterns import is_pattern, matched
from qkit.tensor.formats import FORMATS, Format, layout
from qkit.tensor.packing import pack_bits, pack_nibbles, packed_words, unpack_bits, unpack_nibbles
from qkit.tensor.qtensor import Params, QTensor, param_shape

Spec = tuple[torch.dtype, tuple[int, ...]]
_EXPERT = re.compile(r"\.experts\.\d+\.")

CLASS = "Linear"  # the only class name that a target can be


def specs(weights: Format, activations: Format | None, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Spec]:
    """{suffix: (dtype, shape)} of the tensors that store a linear's weight [out, in]."""
    out, columns = shape
    r, c = param_shape(weights, shape)
    scale_shape: tuple[int, ...] = (1,) if weights.strategy == "tensor" else (r, c)
    scale_dtype = {"model": dtype, "e4m3": torch.float8_e4m3fn, "e8m0": torch.uint8}[weights.scale]
    name = layout(weights, activations)
    result: dict[str, Spec] = {"weight_scale": (scale_dtype, scale_shape)}
    if name == "pack-quantized":
        result["weight_packed"] = (torch.int32, (out, packed_words(columns, weights.bits)))
        result["weight_shape"] = (torch.int64, (2,))
        if not weights.symmetric:
            packed = weights.strategy != "tensor"
            result["weight_zero_point"] = (
                (torch.int32, (packed_words(r, weights.bits), c)) if packed else (torch.int8, (1,))
            )
    elif name == "int-quantized":
        result["weight"] = (torch.int8, shape)
        if not weights.symmetric:
            result["weight_zero_point"] = (torch.int8, scale_shape)
    elif weights.kind == "fp4":
        result["weight_packed"] = (torch.uint8, (out, columns // 2))
    else:
        result["weight"] = (torch.float8_e4m3fn, shape)
    if weights.scale == "e4m3":
        result["weight_global_scale"] = (torch.float32, (1,))
    if activations is not None and activations.strategy == "tensor_group":
        result["input_global_scale"] = (torch.float32, (1,))
    elif activations is not None and not activations.dynamic:
        result["input_scale"] = (dtype, (1,))
    return dict(sorted(result.items()))


def stored_bytes(weights: Format, activations: Format | None, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Bytes of the stored tensors of a linear."""
    return sum(math.prod(s) * d.itemsize for d, s in specs(weights, activations, shape, dtype).values())


def write(q: QTensor, activations: Format | None, static: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """{suffix: tensor} of a linear. static: float32 [1], the scale or global scale of its activations."""
    fmt, p = q.format, q.params
    expected = specs(fmt, activations, q.shape, dtype)
    result: dict[str, Tensor] = {"weight_scale": p.scale.reshape(expected["weight_scale"][1])}
    if "weight_packed" in expected:
        result["weight_packed"] = pack_nibbles(q.codes) if fmt.kind == "fp4" else pack_bits(q.codes, fmt.bits)
    else:
        result["weight"] = q.codes
    if "weight_shape" in expected:
        result["weight_shape"] = torch.tensor(q.shape, dtype=torch.int64)
    if p.zero is not None:
        packed = expected["weight_zero_point"][0] == torch.int32
        result["weight_zero_point"] = (
            pack_bits(p.zero.T.contiguous(), fmt.bits).T.contiguous() if packed else p.zero.reshape(-1)
        )
        if not packed:
            result["weight_zero_point"] = p.zero.reshape(expected["weight_zero_point"][1])
    if p.global_scale is not None:
        result["weight_global_scale"] = p.global_scale
    for name in ("input_scale", "input_global_scale"):
        if name in expected:
            assert static is not None
            result[name] = static.to(expected[name][0]).reshape(1)
    return result


def read(tensors: dict[str, Tensor], fmt: Format, shape: tuple[int, int]) -> QTensor:
    """The QTensor of a linear from its tensors by suffix: the inverse of ``write``."""
    scale = tensors["weight_scale"].reshape(param_shape(fmt, shape))
    zero = tensors.get("weight_zero_point")
    if zero is not None and zero.dtype == torch.int32:
        zero = unpack_bits(zero.T.contiguous(), fmt.bits, scale.shape[0]).T.contiguous()
    if "weight" in tensors:
        codes = tensors["weight"]
    elif fmt.kind == "fp4":
        codes = unpack_nibbles(tensors["weight_packed"])
    else:
        codes = unpack_bits(tensors["weight_packed"], fmt.bits, shape[1])
    zero = None if zero is None else zero.reshape(scale.shape)
    return QTensor(codes, Params(scale, zero, tensors.get("weight_global_scale")), fmt)


# ---- configuration ---------------------------------------------------------------------------------------------


def config(
    formats_by_linear: dict[str, tuple[Format, Format | None]],
    skipped: list[str],
    module_name: dict[str, str],
    cache: Format | None = None,
    ends: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The ``quantization_config`` of config.json.

    formats_by_linear: {linear: (weights, activations)} by checkpoint name
    skipped:     linears that are not quantized, by checkpoint name
    module_name: {checkpoint name: module name} where they differ; both are listed, since loaders match either
    ends:        embeddings and output head among the linears; they are always named, since engines have classes of their own
                 for them, and the group that targets ``Linear`` is chosen among the others
    cache:       format of keys and values, for engines with a quantized KV cache
    Groups of linears with equal formats become one config group. The most common one targets the class
    ``Linear`` and the others exact names, listed first. Where there are several, experts of one format are named by a pattern:
    transformers finds their group by such a target, and uses the first group where there is none.
    """
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    by_formats: dict[tuple[Format, Format | None], list[str]] = {}
    for name, formats_pair in formats_by_linear.items():
        by_formats.setdefault(formats_pair, []).append(name)
    ordered = sorted(by_formats.items(), key=lambda item: (len(set(item[1]) - set(ends)), item[1]))
    experts = {formats_pair for formats_pair, names in by_formats.items() if any(map(_EXPERT.search, names))}
    ends_named = {*ends, *(module_name[n] for n in ends if n in module_name)}
    groups: dict[str, Any] = {}
    for i, ((weights, activations), names) in enumerate(ordered):
        is_last = i == len(ordered) - 1
        pattern = [f"re:.*{_EXPERT.pattern}.*"] if experts == {(weights, activations)} and len(by_formats) > 1 else []
        exact = [n for n in names if not (pattern and _EXPERT.search(n))]
        all_names = sorted({*exact, *(module_name[n] for n in exact if n in module_name)})
        of_ends = [n for n in all_names if n in ends_named]
        groups[f"group_{i}"] = QuantizationScheme(
            targets=[*pattern, *(["Linear", *of_ends] if is_last else all_names)],
            weights=_args(weights, activations=False),
            input_activations=None if activations is None else _args(activations, activations=True),
            format=layout(weights, activations),
        )
    formats = {layout(w, a) for w, a in by_formats}
    ignore = sorted({*skipped, *(module_name[n] for n in skipped if n in module_name)})
    library_config = QuantizationConfig(
        config_groups=groups,
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status="compressed",
        ignore=ignore,
        kv_cache_scheme=None if cache is None else _args(cache, activations=True),
    )
    return {
        "version": compressed_tensors.__version__,
        "sparsity_config": {},
        "transform_config": {},
        **library_config.model_dump(mode="json"),
    }


def cache_kind(quantization: dict[str, Any] | None) -> str | None:
    """The kind (``kvcache.policy``) of the scales of keys and values that a config declares; None where it declares none."""
    scheme = (quantization or {}).get("kv_cache_scheme")
    if not isinstance(scheme, dict):
        return None
    kinds = {
        (8, "float", "tensor", False): "fp",
        (8, "float", "attn_head", False): "fp-head",
        (4, "float", "tensor_group", "local"): "nvfp",
    }
    return kinds.get(tuple(scheme.get(x, False) for x in ("num_bits", "type", "strategy", "dynamic")))


def _args(fmt: Format, activations: bool) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    extra: dict[str, Any] = {}
    if fmt.scale == "e4m3":
        extra["scale_dtype"] = torch.float8_e4m3fn
    elif fmt.scale == "e8m0":
        extra["scale_dtype"] = torch.uint8
    if activations and fmt.strategy == "tensor_group":
        extra["observer"] = "static_minmax"
    dynamic: Any = "local" if activations and fmt.strategy == "tensor_group" else fmt.dynamic
    return QuantizationArgs(
        num_bits=fmt.bits,
        type="int" if fmt.kind == "int" else "float",
        strategy=fmt.strategy,
        group_size=fmt.group,
        block_structure=list(fmt.block) if fmt.block else None,
        symmetric=fmt.symmetric,
        dynamic=dynamic,
        **extra,
    )


def parse_args(data: dict[str, Any], where: str) -> Format:
    """The Format of a config's weights or activations entry. Raises Unsupported for a format that qkit cannot run."""
    known_kinds = {("int", b): "int" for b in range(1, 9)} | {("float", 4): "fp4", ("float", 8): "fp8"}
    key = (str(data.get("type", "int")), int(data.get("num_bits", 8)))
    strategy, group = data.get("strategy"), data.get("group_size")
    scale_dtype = str(data.get("scale_dtype") or "")
    if key not in known_kinds or strategy is None:
        raise Unsupported(f"{where}: {key[1]}-bit {key[0]} with strategy {strategy!r} is not a format that qkit runs")
    mx = known_kinds[key] != "int" and strategy == "group" and group == 32 and "uint8" in scale_dtype
    scale = "e8m0" if mx else "e4m3" if strategy == "tensor_group" else "model"
    block = data.get("block_structure")
    fmt = Format(
        name="",
        kind=known_kinds[key],
        bits=key[1],
        strategy=str(strategy),
        group=group if strategy in ("group", "tensor_group") else None,
        block=(block[0], block[1]) if block else None,
        symmetric=bool(data.get("symmetric", True)),
        scale=scale,
        dynamic=bool(data.get("dynamic", False)),
    )
    return Format(**{**fmt.__dict__, "name": _name_of(fmt)})


def _name_of(fmt: Format) -> str:
    for candidate in FORMATS.values():
        if (candidate.kind, candidate.bits, candidate.scale, candidate.symmetric) == (
            fmt.kind,
            fmt.bits,
            fmt.scale,
            fmt.symmetric,
        ) and (candidate.strategy == fmt.strategy):
            return candidate.name
    number = fmt.kind if fmt.kind[-1].isdigit() else f"{fmt.kind}{fmt.bits}"
    return f"{number}_{fmt.strategy}"


def formats_of(quantization: dict[str, Any], names: list[str], where: str) -> dict[str, tuple[Format, Format | None]]:
    """{linear: (weights, activations)} of the linears in ``names`` that the config quantizes.

    A target is the name of a class, an exact name, or a pattern. Raises Unsupported for formats that qkit cannot run, and for
    patterns that take too long to match.
    """
    groups, ignore = quantization.get("config_groups") or {}, quantization.get("ignore") or []
    parsed = []
    for label, group in groups.items():
        weights = parse_args(group["weights"], f"{where}: {label}")
        activations = group.get("input_activations")
        parsed.append(
            (group["targets"], weights, None if activations is None else parse_args(activations, f"{where}: {label}"))
        )
    targets_of_all = [*ignore, *(t for targets, _, _ in parsed for t in targets)]
    if (wrong := next((t for t in targets_of_all if not is_pattern(t)), None)) is not None:
        raise Unsupported(
            f"{where}: {wrong[:80]!a} is no name and no pattern of layers: run 'qkit verify' on the folder"
        )
    try:
        hits = matched(targets_of_all, names)
    except ValueError as e:
        raise Unsupported(f"{where}: quantization_config: {e}: list the layers by name") from e

    def named(targets: list[str]) -> set[str]:
        return {n for t in targets for n in hits.get(t, (t,))}

    ignored, specific = named(ignore), [(named(ts), w, a) for ts, w, a in parsed]
    by_class = next(((w, a) for ts, w, a in parsed if CLASS in ts), None)
    result: dict[str, tuple[Format, Format | None]] = {}
    for name in names if CLASS not in ignore else ():
        # Exact names and patterns go before class names, whatever the order in the file.
        hit = next(((w, a) for members, w, a in specific if name in members), by_class)
        if hit is not None and name not in ignored:
            result[name] = hit
    return result
