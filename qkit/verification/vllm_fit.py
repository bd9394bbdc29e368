"""How vLLM loads linears of one combination of formats: by its own code where it was asked, else by the table made of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from qkit.verification.engine_types import PLATFORMS, SELECTED, TABLE, EngineFit, ModelFacts, Selected
from qkit.verification.loaded_layers import LoadedLayer
from qkit.verification.vllm_table import (
    COLUMN,
    CPU,
    EXPERTS,
    Choice,
    NumberFormat,
    choice,
    format_key,
    has_class,
    known,
    version,
)
from qkit.verification.vllm_words import shortened, why

VLLM = "vLLM"
LOADS_ON = "it loads on"  # begins where vLLM loads what it refuses on the GPUs that were asked for
NEEDS_AMX = "on CPUs it needs AMX"
NO_CPU, CPU_TOO = "no kernel for CPUs", "runs on CPUs too"
_NO_CPU_EXPERTS = "experts have no kernel for CPUs"
SPLIT = "the group size has to divide the input columns of every tensor-parallel rank"
_A16_IGNORED = "vLLM does not see that inputs are to stay as they are, and quantizes them too on Blackwell"
_LIMITS: dict[str, tuple[str, ...]] = {  # of schemes, by their classes
    "CompressedTensorsWNA8Int": (
        "on CPUs without AMX inputs stay in 16 bits",
        "on GPUs vLLM picks Marlin or Machete before Humming, its kernel with INT8 inputs",
    ),
    "CompressedTensorsW4A8Int": ("legacy path that stores one byte per weight: export as pack-quantized",),
    "CompressedTensorsW8A8Fp8": ("computes in FP8 from sm89 on, weight-only before",),
}
_AMX = "on CPUs with AMX it rounds inputs to 8 bits, unless VLLM_CPU_INT4_W4A8=0 is set"
_FP4 = "computes in FP4 on Blackwell, weight-only on other GPUs"
_CUTLASS_INT8 = "CutlassInt8ScaledMMLinearKernel"
_GPU_BACKENDS = ("MARLIN",)  # of experts, that are selected on CPUs too
_NO_BACKEND = "NONE"


def vllm_fit(
    weights: NumberFormat,
    activations: NumberFormat | None,
    packing: str,
    facts: ModelFacts,
    selected: Selected | None = None,
) -> EngineFit:
    """The answer of vLLM. selected: what its own code said, by linears of ``facts.layers``."""
    if "embeddings" in facts.uses:
        return _embeddings(weights, facts)
    layers = facts.layers or (LoadedLayer((), EXPERTS if facts.experts else COLUMN, 4096, 16 * _even(weights)),)
    how = SELECTED if selected is not None else TABLE.format(version())
    if selected is None:
        chosen = _from_table(weights, activations, packing, facts, layers)
    else:
        chosen = _from_engine(selected, layers)
    refusal = _refuses(facts)
    if chosen is None and refusal is None:
        refusal = _no_scheme(weights, activations)
    if refusal is not None or chosen is None:
        return EngineFit(VLLM, None, (str(refusal),), how)
    runs = {gpu: [_when_run(gpu, c, weights, activations) for c in found] for gpu, found in chosen.items()}
    loading = _loading(runs)
    kernels = {gpu: dict(Counter(_said(c) for c in found).most_common()) for gpu, found in runs.items()}
    if not loading:
        reason = why(next(iter(runs.values())), weights, activations)
        whole = selected is not None and selected.refused  # the formats may not be what it refuses
        elsewhere = () if whole else _elsewhere(weights, activations, packing, facts, layers, runs)
        return EngineFit(VLLM, None, (reason, *elsewhere), how, (), kernels)
    schemes = Counter(c.scheme for gpu in loading for c in runs[gpu])
    main = schemes.most_common(1)[0][0]
    reasons = {gpu: why(found, weights, activations) for gpu, found in runs.items() if gpu not in loading}
    limits = [
        *_kernel_limits(runs, loading, reasons),
        *_cpu_limits(runs, loading, facts, reasons),
        *_scheme_limits(main, runs, loading),
    ]
    if weights.kind == "int" and weights.group is not None and facts.ranks == 1:
        limits.append(SPLIT)
    if activations is None and CPU in loading and any(c.kernel == "CPUWNA16LinearKernel" for c in runs[CPU]):
        limits.append(_AMX)
    if weights.strategy == "block":
        limits.append(NEEDS_AMX)
    if weights.scale == "e4m3" and activations is not None:
        limits.append(_FP4)
    if weights.scale == "e8m0" and activations is None:
        limits.append(_A16_IGNORED)
    limits += _group_limits(weights, runs, loading)
    if facts.kind and selected is None and not has_class(facts.kind):
        limits.append(f"it has no class {facts.kind} of its own, and takes that of transformers where it can")
    return EngineFit(VLLM, main, tuple(limits), how, loading, kernels)


def _loading(runs: Mapping[str, Sequence[Choice]]) -> tuple[str, ...]:
    """The kinds of GPU that refuse no layer."""
    return tuple(gpu for gpu, found in runs.items() if not any(c.refused for c in found))


def _elsewhere(
    weights: NumberFormat,
    activations: NumberFormat | None,
    packing: str,
    facts: ModelFacts,
    layers: Sequence[LoadedLayer],
    asked: Collection[str],
) -> Iterator[str]:
    """Where vLLM loads by the table what it refuses on all GPUs that were asked for, if those were not all there are."""
    others = tuple(p for p in PLATFORMS if p not in asked)
    found = _from_table(weights, activations, packing, replace(facts, platforms=others), layers) if others else None
    if found is not None:
        loading = _loading({g: [_when_run(g, c, weights, activations) for c in of] for g, of in found.items()})
        yield f"{LOADS_ON} {', '.join(loading)}" if loading else "nor does it load on any other GPU"


def _even(weights: NumberFormat) -> int:
    """A number that every power of two of the table divides, and the group."""
    return 256 * (weights.group or 1)


def _from_table(
    weights: NumberFormat,
    activations: NumberFormat | None,
    packing: str,
    facts: ModelFacts,
    layers: Sequence[LoadedLayer],
) -> dict[str, list[Choice]] | None:
    if not known(format_key(weights, activations, packing)):
        return None
    keys = [
        format_key(weights, activations, packing, layer.columns if layer.kind == COLUMN else None) for layer in layers
    ]
    found: dict[str, list[Choice]] = {}
    for gpu in facts.platforms:
        choices = [
            Choice(refused=layer.problem)
            if layer.problem
            else choice(layer.kind, key, gpu, layer.rows, layer.columns, facts.dtype)
            for layer, key in zip(layers, keys, strict=True)
        ]
        found[gpu] = [c if c is not None else Choice(refused="it has no scheme for this combination") for c in choices]
    return found


def _from_engine(selected: Selected, layers: Sequence[LoadedLayer]) -> dict[str, list[Choice]]:
    """One choice for every layer that vLLM made of these linears."""
    found: dict[str, list[Choice]] = {}
    for gpu, by_linear in selected.by_gpu.items():
        whole = selected.refused.get(gpu, "")
        own: dict[str, Choice] = {}
        for layer in layers:
            for name in layer.names:
                place, chosen = by_linear.get(name, (name, Choice(refused=whole or f"it did not ask for {name}")))
                own[place] = chosen
        found[gpu] = [Choice(refused=whole)] if whole else list(own.values())
    return found


def _when_run(gpu: str, chosen: Choice, weights: NumberFormat, activations: NumberFormat | None) -> Choice:
    """The choice, refused where it is known to stop when it is run, whatever was selected."""
    if chosen.refused:
        return chosen
    if gpu in ("sm100", "sm120") and chosen.kernel == _CUTLASS_INT8:
        return replace(
            chosen, refused="its CUTLASS kernel has no INT8 for this GPU and stops when it is run: use fp8_dynamic"
        )
    if chosen.kernel == _NO_BACKEND:
        return replace(
            chosen, refused="it finds no backend for experts of this scheme, and says so only when it loads them"
        )
    if gpu == CPU and chosen.kernel in _GPU_BACKENDS:
        return replace(chosen, refused=f"the kernel that is selected for experts, {chosen.kernel}, runs on GPUs alone")
    if gpu == CPU and weights.kind == "fp8" and activations is not None and not activations.dynamic:
        return replace(chosen, refused="static scales of inputs do not run on CPUs")
    return chosen


def _refuses(facts: ModelFacts) -> str | None:
    """Why vLLM does not load a file for what is beside the formats that it has schemes for."""
    if facts.unshared:
        return facts.unshared
    if facts.torn_experts:
        return f"it runs the experts of a layer as one product, and those of {facts.torn_experts} have several formats"
    if facts.torn:
        return f"it loads {facts.torn} as one, and their formats differ"
    if facts.uneven:
        return f"it loads {facts.uneven}, and a block of rows would belong to both"
    return None


def _no_scheme(weights: NumberFormat, activations: NumberFormat | None) -> str:
    packings = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
                "mxfp4-pack-quantized", "mxfp8-quantized")  # fmt: skip
    stored = [packing for packing in packings if known(format_key(weights, activations, packing))]
    if stored:
        return f"it takes this combination only as {', '.join(sorted(stored))}"
    return f"the table of {version()} has no scheme for this combination"


def _embeddings(weights: NumberFormat, facts: ModelFacts) -> EngineFit:
    """vLLM's lookup of packed rows (CompressedTensorsEmbeddingWNA16Int, since 0.29), as its source says; it was not run."""
    how = TABLE.format(version())
    if "head" in facts.uses:
        why = "it cannot multiply with packed embeddings, and the output head is tied to them"
        return EngineFit(VLLM, None, (why,), how)
    if weights.kind != "int" or not weights.symmetric or weights.bits not in (2, 4, 8):
        return EngineFit(VLLM, None, ("it looks embeddings up in int2, int4 or int8 alone",), how)
    limits = ("embeddings: its class for this model has to pass the quantization on to them", NO_CPU)
    gpus = tuple(p for p in facts.platforms if p != CPU)
    return EngineFit(VLLM, "CompressedTensorsEmbeddingWNA16Int", limits, how, gpus)


# ---- in words ----------------------------------------------------------------------------------------------------


def short(kernel: str) -> str:
    """The name of a kernel without what all names have."""
    for end in ("ScaledMMLinearKernel", "LinearKernel", "ScaledMMKernel", "Kernel"):
        if kernel.endswith(end) and kernel != end:
            return kernel.removesuffix(end)
    return kernel.capitalize() if kernel.isupper() and "_" not in kernel else kernel


def _said(chosen: Choice) -> str:
    """What a JSON report says of one layer."""
    return f"refused: {shortened(chosen.refused)}" if chosen.refused else chosen.kernel or chosen.scheme


def _kernel_limits(
    runs: Mapping[str, Sequence[Choice]], loading: Sequence[str], reasons: Mapping[str, str]
) -> Iterator[str]:
    """Which kernels run layers on which GPUs, and which GPUs do not load them."""
    gpus = [gpu for gpu in runs if gpu != CPU]
    names = {gpu: _kernels(runs[gpu]) for gpu in gpus if gpu in loading and _kernels(runs[gpu])}
    if names:
        main = Counter(names.values()).most_common(1)[0][0]
        others = _grouped({gpu: text for gpu, text in names.items() if text != main})
        where = f" ({'; '.join(f'{of}: {text}' for text, of in others)})" if others else ""
        yield f"runs on GPUs with {main}{where}"
    elif gpus and not set(gpus) & set(loading):
        yield "no kernel for GPUs"
    if names or set(gpus) & set(loading):
        for reason, of in _grouped({gpu: reason for gpu, reason in reasons.items() if gpu != CPU}):
            yield f"not on {of}: {reason}"


def _kernels(choices: Sequence[Choice]) -> str:
    """'Machete, Humming for 3 layers': the one of most layers first."""
    counts = Counter(short(c.kernel) for c in choices if c.kernel).most_common()
    return ", ".join(name if i == 0 else f"{name} for {n} layer{'s' * (n > 1)}" for i, (name, n) in enumerate(counts))


def _grouped(by_gpu: Mapping[str, str]) -> list[tuple[str, str]]:
    """[(text, 'sm80, sm86')]"""
    groups: dict[str, list[str]] = {}
    for gpu, text in by_gpu.items():
        groups.setdefault(text, []).append(gpu)
    return [(text, ", ".join(of)) for text, of in groups.items()]


def _cpu_limits(
    runs: Mapping[str, Sequence[Choice]], loading: Sequence[str], facts: ModelFacts, reasons: Mapping[str, str]
) -> Iterator[str]:
    if CPU not in runs:
        return
    if CPU in loading:
        yield CPU_TOO
    elif facts.experts:
        yield _NO_CPU_EXPERTS
    else:
        yield NO_CPU if "kernel" in reasons[CPU] else f"not on CPUs: {reasons[CPU]}"


def _scheme_limits(main: str, runs: Mapping[str, Sequence[Choice]], loading: Sequence[str]) -> Iterator[str]:
    others = {gpu: c.scheme for gpu in loading for c in runs[gpu] if c.scheme != main}
    for scheme, of in _grouped(others):
        yield f"{of}: loads as {scheme}"
    yield from _LIMITS.get(main, ())


def _group_limits(weights: NumberFormat, runs: Mapping[str, Sequence[Choice]], loading: Sequence[str]) -> Iterator[str]:
    group = weights.group
    humming = any("humming" in c.kernel.lower() for gpu in loading for c in runs[gpu])
    if humming and weights.kind == "int" and group is not None and group & (group - 1):
        yield f"a group size of {group} does not fit Humming's tiles, and the result may be wrong: use 32, 64, 128 or -1"
