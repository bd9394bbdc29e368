"""``qkit recommend``: the scheme, the KV cache and the commands for a model on a machine.

What is compared are bytes (exact for the weights), what the engine's table says of its kernels, and the expected loss: of a
profile of this model where there is one, else what the scheme cost the model in ``planning.measured_losses``.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qkit.allocation.pareto import uniform
from qkit.errors import BadInput, QkitError, UsageError
from qkit.families.structure import ModelStructure
from qkit.kvcache.engine_caches import ENGINE_CACHES, PLAIN, refusal
from qkit.kvcache.shape import CacheShape
from qkit.planning.devices import CPU
from qkit.planning.engine_rules import LLAMA_CPP, TITLES
from qkit.planning.fused_layers import engine_rows_of
from qkit.planning.measured_losses import measured_losses
from qkit.planning.request import Request
from qkit.sensitivity.candidates import parse_candidates
from qkit.sensitivity.profile import Profile
from qkit.system.words import megabytes
from qkit.tensor.formats import GGUF_SCHEMES
from qkit.verification.model_engines import EngineRow, engine_lines
from qkit.workflows.budget_bytes import running_bytes
from qkit.workflows.machines import VLLM_SHARE, Machine, machine_of
from qkit.workflows.options import DEFAULTS, read_options
from qkit.workflows.quantize import open_structure, prepare
from qkit.workflows.resolve import look_ahead

NEGLIGIBLE = (
    0.01  # nats a token; our choice: about one percent of perplexity, the limit of 'serve-command --measure' too
)
CONTEXT = 8192  # tokens, where nobody says how many
_MEASURE = "kl"
MIXED = "mixed"
# What an engine can hold keys and values in: vLLM's names, on GPUs and on CPUs; llama.cpp's.
_VLLM_CACHES, _CPU_CACHES = (PLAIN, "int8_per_token_head", "fp8"), (PLAIN, "fp8")
_ONLY_PLAIN = ("sm75",)  # GPUs before those that its narrow caches are for
_LLAMA_CACHES = {"f16": 2.0, "q8_0": 34 / 32}  # bytes of a number


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One scheme on the machine, with the best KV cache that leaves room.

    kernels: what runs its layers; weights, cache_bytes, activations: bytes, at the context; loss: expected KL divergence in
    nats a token, weights and cache together; refused: why the engine does not load it; fits:
    whether it is within the memory
    """

    scheme: str
    weights: int = 0
    cache: str = ""
    cache_bytes: int = 0
    activations: int = 0
    loss: float = 0.0
    kernels: tuple[str, ...] = ()
    refused: str = ""
    fits: bool = False

    @property
    def total(self) -> int:
        """Bytes of all that is counted."""
        return self.weights + self.cache_bytes + self.activations


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """usable: bytes that the engine has of ``memory``; evidence: what the losses rest on; chosen: None where nothing fits

    plain: the model as it is; tokens: of KV caches that the memory holds beside the chosen file; commands: to make, check and
    serve it; notes: what else to know
    """

    model: str
    engine: str
    device: str | None
    memory: int
    usable: int
    context: int
    evidence: str
    plain: Candidate
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    why: str
    tokens: int | None
    commands: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """All fields, with the totals."""
        data = asdict(self)
        for name in ("plain", "chosen"):
            if data[name] is not None:
                data[name]["total"] = getattr(self, name).total
        for entry, candidate in zip(data["candidates"], self.candidates, strict=True):
            entry["total"] = candidate.total
        return data


def recommend(
    model: str,
    context: int | None = None,
    memory: str | None = None,
    engine: str | None = None,
    device: str | None = None,
    profile: Path | None = None,
) -> Recommendation:
    """What to make of a language model for a machine.

    memory: as '8GB', None: all that the device has; context: tokens of one sequence, None: CONTEXT, or all that a shorter model
    has; profile: a folder of 'qkit profile'

    Raises UsageError for a context or a machine that makes no sense, Unsupported for what is no language model, BadInput for
    the profile of another model, and what opening the model raises.
    """
    machine = machine_of(memory, engine, device)
    structure = open_structure(model, language_for="qkit recommend")
    context = _context(structure, model, context)
    caches = _caches(structure, machine, context)
    activations = running_bytes(structure, context)[1]
    plain_cache = next(iter(caches))
    whole = sum(t.nbytes for n, t in structure.checkpoint.tensors.items() if n not in structure.tied)
    plain = Candidate(
        scheme=str(structure.dtype).removeprefix("torch."),
        weights=whole,
        cache=plain_cache,
        cache_bytes=caches[plain_cache],
        activations=activations,
        loss=0.0,
    )
    plain = replace(plain, fits=plain.total <= machine.usable)
    known = None if profile is None else _profile(profile, structure)
    found = [
        _with_cache(_of_scheme(request, machine, whole), loss, caches, activations, machine)
        for request, loss in _asked(model, machine, known)
    ]
    notes = []
    if profile is not None:
        try:
            found.append(_mixed(model, machine, profile, caches, activations))
        except UsageError as e:
            notes.append(f"no mix of formats: {e}")
    chosen, why = choose(found)
    if chosen is None:
        smallest = min((c for c in found if not c.refused), key=lambda c: c.total, default=None)
        why = f"the smallest of them, {smallest.scheme}, needs {megabytes(smallest.total)}" if smallest else why
    return Recommendation(
        model=model,
        engine=machine.engine,
        device=None if machine.device is None else machine.device.name,
        memory=machine.memory,
        usable=machine.usable,
        context=context,
        evidence=_evidence(known, profile),
        plain=plain,
        candidates=tuple(sorted(found, key=_order)),
        chosen=chosen,
        why=why,
        tokens=_tokens(chosen, machine, context),
        commands=() if chosen is None else tuple(_commands(model, context, machine, chosen, profile)),
        notes=(*notes, *_notes(plain, machine, profile)),
    )


def choose(found: list[Candidate]) -> tuple[Candidate | None, str]:
    """(what is recommended of what fits, why): the smallest one whose loss is negligible, else the one of least loss."""
    fitting = [c for c in found if c.fits]
    if not fitting:
        loaded = any(not c.refused for c in found)
        return None, "nothing that the engine loads fits" if loaded else "the engine loads none of the schemes"
    small = [c for c in fitting if c.loss <= NEGLIGIBLE]
    if small:
        return min(small, key=lambda c: (c.total, c.loss)), f"the smallest with an expected loss below {NEGLIGIBLE:g}"
    return min(fitting, key=lambda c: (c.loss, c.total)), "the least expected loss of what fits"


def _context(structure: ModelStructure, model: str, asked: int | None) -> int:
    longest = getattr(structure.text_config, "max_position_embeddings", None)
    if asked is None:
        return min(CONTEXT, longest) if isinstance(longest, int) else CONTEXT
    if isinstance(longest, int) and asked > longest:
        raise UsageError(f"--context {asked}: the model in {model} has {longest} positions: use at most so many")
    return asked


def _profile(folder: Path, structure: ModelStructure) -> Profile:
    known = Profile.load(folder)
    if known.fingerprint != structure.checkpoint.fingerprint():
        raise BadInput(f"{folder}: the profile is of another model: use another --profile, or leave it out")
    if _MEASURE not in known.measures:
        raise UsageError(
            f"--profile {folder}: it has the measures {', '.join(known.measures)}, and {_MEASURE} is compared: make one with "
            f"--measures {_MEASURE}"
        )
    return known


def _asked(model: str, machine: Machine, profile: Profile | None) -> Iterator[tuple[Request, float]]:
    """The schemes to compare, of the engine's kind of file, with their expected losses: those of the profile, where there is
    one."""
    groups: Mapping[str, int | None] = {} if profile is None else profile.request["group_sizes"]
    measured = measured_losses().schemes
    losses = measured if profile is None else {name: cost for name, (_, cost) in uniform(profile, _MEASURE).items()}
    for name, loss in losses.items():
        candidate = parse_candidates(name, groups.get(name))[0]
        scheme = candidate.scheme
        if scheme is None or candidate.outliers or candidate.rank:  # no engine loads what lies beside the codes
            continue
        if scheme.weights.gguf == (machine.engine == LLAMA_CPP):
            group = groups.get(name)
            yield Request(model=model, scheme=scheme.name, method="rtn", group_size=group), loss


def _caches(structure: ModelStructure, machine: Machine, context: int) -> dict[str, int]:
    """Bytes of one sequence by the cache's name, from the one in 16 bits on."""
    config: Any = structure.text_config
    gguf = machine.engine == LLAMA_CPP
    plain = next(iter(_LLAMA_CACHES)) if gguf else PLAIN
    try:
        shape = CacheShape.of(config, windows=True)
    except QkitError:  # attention that keeps something else
        latent = getattr(config, "kv_lora_rank", None)
        if latent:
            numbers = (latent + getattr(config, "qk_rope_head_dim", 0)) * config.num_hidden_layers
            return {plain: 2 * numbers * context}
        return {plain: running_bytes(structure, context)[0]}
    heads = 2 * shape.heads * sum(shape.tokens_of(context))  # of keys and values, all layers
    if gguf:
        return {name: int(heads * shape.head_dim * size) for name, size in _LLAMA_CACHES.items()}
    if machine.engine != "vllm" or machine.platform in _ONLY_PLAIN:
        return {PLAIN: int(heads * ENGINE_CACHES[PLAIN].bytes_of(shape.head_dim))}
    names = _CPU_CACHES if machine.platform == CPU else _VLLM_CACHES
    able = [name for name in names if not refusal(name, None, shape.head_dim)]
    return {name: int(heads * ENGINE_CACHES[name].bytes_of(shape.head_dim)) for name in able}


def _of_scheme(request: Request, machine: Machine, whole: int) -> Candidate:
    """Bytes of the weights in the engine, and whether and how it loads them. whole: bytes of the model as it is, which
    transformers makes of every packed file."""
    scheme = str(request.scheme)
    try:
        prepared = prepare(replace(request, engine=machine.engine, gpu=machine.gpu))
    except QkitError as e:
        return Candidate(scheme=scheme, refused=str(e))
    kernels = _kernels(engine_rows_of(prepared.plan, prepared.structure), machine)
    size = whole if machine.engine == "transformers" else prepared.forecast.packed_bytes
    return Candidate(scheme=scheme, weights=size, kernels=kernels)


def _kernels(rows: list[EngineRow], machine: Machine) -> tuple[str, ...]:
    """What runs the layers: vLLM's kernels on the kind of GPU, else the classes that load them, or the GPUs that do."""
    title = TITLES.get(machine.engine, machine.engine)
    mine = [row for row in rows if row.engine == title]
    if machine.platform is not None:
        named = {kernel for row in mine for kernel in row.kernels.get(machine.platform, ())}
        if named:
            return tuple(sorted(named))
    line = next((line for line in engine_lines(rows) if line.engine == title), None)
    if line is None:
        return ()
    return (", ".join(line.platforms),) if line.platforms else line.classes


def _with_cache(
    candidate: Candidate, loss: float, caches: Mapping[str, int], activations: int, machine: Machine
) -> Candidate:
    """The candidate with the first KV cache that leaves room, else the smallest. loss: of the weights, to which that of the
    cache is added (none is known for 16 bits, and for llama.cpp)."""
    if candidate.refused:
        return replace(candidate, loss=loss)
    ways = []
    for name, size in caches.items():
        total = loss + measured_losses().caches.get(name, 0.0)
        way = replace(candidate, cache=name, cache_bytes=size, activations=activations, loss=total)
        ways.append(replace(way, fits=way.total <= machine.usable))
    return next((way for way in ways if way.fits), min(ways, key=lambda way: way.total))


def _mixed(model: str, machine: Machine, profile: Path, caches: Mapping[str, int], activations: int) -> Candidate:
    """The mix of the profile's formats, and the cache, of least loss. Raises UsageError where there is none."""
    if machine.engine == "transformers":
        raise UsageError("transformers expands every format to the same bytes")
    found, refused = list[Candidate](), ""
    for name, size in caches.items():
        room = machine.usable - activations - size
        values = {**DEFAULTS, "model": model, "size": f"{room}B", "profile": profile}
        values |= {"engine": machine.engine, "gpu": machine.gpu}
        try:
            budgeted = look_ahead(read_options(values, Path(_out(model, MIXED)))).decided.budgeted
        except UsageError as e:
            refused = refused or str(e)
            continue
        assert budgeted is not None  # the profile is there
        allocation = budgeted.allocation
        formats = tuple(sorted({*allocation.picks.values()}))
        weights = allocation.bytes + budgeted.profile.fixed_bytes
        mix = Candidate(scheme=MIXED, weights=weights, kernels=formats)
        found.append(_with_cache(mix, allocation.cost, {name: size}, activations, machine))
    best = min(found, key=lambda c: c.loss, default=None)
    if best is None:
        raise UsageError(refused)
    return best


def _evidence(profile: Profile | None, folder: Path | None) -> str:
    known = measured_losses()
    cached = f"KV caches cost what they cost {known.model} at {known.cache_context} tokens"
    if profile is not None:
        return f"sums over the layers of this model, by the profile in {folder}; {cached}"
    return (
        f"KL divergence of {known.model} in each scheme, measured on {known.text} with --quality {known.quality}; larger "
        f"models usually lose less; {cached}"
    )


def _notes(plain: Candidate, machine: Machine, profile: Path | None) -> Iterator[str]:
    if plain.fits:
        yield f"the model fits as it is, in {plain.scheme}: {megabytes(plain.total)}"
    if machine.engine == "vllm" and machine.usable < machine.memory:
        share = f"{VLLM_SHARE:.0%} of a GPU's memory, here {megabytes(machine.usable)}"
        yield f"vLLM uses {share}, unless --gpu-memory-utilization says more"
    if machine.engine == LLAMA_CPP:
        yield "what a KV cache in q8_0 costs was not measured, and is not part of the expected loss"
    if machine.engine == "transformers":
        yield "transformers expands packed weights to 16 bits: the file is smaller, and its memory is not"
    yield "counted are weights, the KV cache of one sequence and activations of one block; buffers of the engine come on top"
    if profile is None:
        yield "with --profile (a folder of 'qkit profile') the losses are this model's own, and a mix of formats is tried"


def _tokens(chosen: Candidate | None, machine: Machine, context: int) -> int | None:
    """Tokens of KV caches that fit beside the weights, of all sequences together."""
    if chosen is None or not chosen.cache_bytes:
        return None
    return (machine.usable - chosen.weights - chosen.activations) * context // chosen.cache_bytes


def _out(model: str, scheme: str) -> str:
    return f"{Path(model).name or 'model'}-{scheme.lower()}"


def _commands(model: str, context: int, machine: Machine, chosen: Candidate, profile: Path | None) -> Iterator[str]:
    """To make, check and serve what was chosen."""
    out = _out(model, chosen.scheme)
    words = ["qkit", "quantize", "--model", model]
    if chosen.scheme == MIXED:
        words += ["--size", f"{machine.usable - chosen.activations - chosen.cache_bytes}B", "--profile", str(profile)]
    else:
        words += ["--scheme", chosen.scheme.lower()]
    words += ["--engine", machine.engine] if chosen.scheme.upper() not in GGUF_SCHEMES else []
    words += ["--gpu", machine.gpu] if machine.gpu else []
    words += ["--kv", "fp8"] if chosen.cache == "fp8" else []
    yield shlex.join([*words, "--out", out])
    gguf = machine.engine == LLAMA_CPP
    target = f"{out}/model.gguf" if gguf else out
    yield shlex.join(["qkit", "verify", target, "--engine", machine.engine, "--python", "VENV/bin/python"])
    if gguf:
        cache = [] if chosen.cache == "f16" else ["--cache-type-k", chosen.cache, "--cache-type-v", chosen.cache]
        yield shlex.join(["llama-server", "--model", target, "--ctx-size", str(context), *cache])
    elif machine.engine == "vllm":
        cache = [] if chosen.cache == PLAIN else ["--kv-cache-dtype", chosen.cache]
        yield shlex.join(["vllm", "serve", out, "--max-model-len", str(context), *cache])


def _order(c: Candidate) -> tuple[bool, bool, float, int]:
    """What fits first, then by loss."""
    return bool(c.refused), not c.fits, c.loss, c.total
