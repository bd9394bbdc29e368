"""``qkit recommend``: the scheme, the KV cache and the commands for a model on a machine.

What is compared are bytes (exact for the weights), what the engine's table says of its kernels, and the expected loss: of a
profile of this model where there is one, else what the scheme cost the model in ``planning.measured_losses``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qkit.allocation.pareto import uniform
from qkit.errors import BadCheckpoint, BadInput, QkitError, UsageError
from qkit.families.sketch import CONFIG, is_config_alone, lacks_config, sketched
from qkit.families.structure import ModelStructure
from qkit.files.folder import list_names
from qkit.files.gguf_converter import INSTEAD
from qkit.files.locate import find_model
from qkit.kvcache.engine_caches import ENGINE_CACHES, PLAIN, refusal
from qkit.kvcache.shape import CacheShape
from qkit.planning.devices import CPU
from qkit.planning.engine_rules import LLAMA_CPP, TITLES
from qkit.planning.fused_layers import engine_rows_of
from qkit.planning.measured_losses import measured_losses
from qkit.planning.request import Request
from qkit.sensitivity.candidates import parse_candidates
from qkit.sensitivity.profile import Profile
from qkit.verification.model_engines import EngineRow, engine_lines
from qkit.workflows.budget_bytes import running_bytes
from qkit.workflows.machines import Machine, machine_of
from qkit.workflows.options import DEFAULTS, read_options
from qkit.workflows.quantize import open_structure, prepare
from qkit.workflows.recommend_words import commands, evidence, notes, out_of, remedy, tokens
from qkit.workflows.recommendation import MIXED, Candidate, Recommendation, choose, order
from qkit.workflows.resolve import look_ahead

_SHAPES = "the weights are not here: sizes are those of the model that config.json describes"
_NO_TOKENIZER = "this depends on the tokenizer, which is not here: copy tokenizer.json and tokenizer_config.json there"
CONTEXT = 8192  # tokens, where nobody says how many
_MEASURE = "kl"
# What an engine can hold keys and values in: vLLM's names, on GPUs and on CPUs; llama.cpp's.
_VLLM_CACHES, _CPU_CACHES = (PLAIN, "int8_per_token_head", "fp8"), (PLAIN, "fp8")
_ONLY_PLAIN = ("sm75",)  # GPUs before those that its narrow caches are for
# Models whose sliding windows llama.cpp has; of others it keeps all keys and values.
_LLAMA_WINDOWS = (
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gemma3n",
    "gemma3n_text",
    "cohere2",
    "gpt_oss",
    "olmo3",
    "exaone4",
)
_LLAMA_CACHES = {"f16": 2.0, "q8_0": 34 / 32}  # bytes of a number


def recommend(
    model: str,
    context: int | None = None,
    memory: str | None = None,
    engine: str | None = None,
    device: str | None = None,
    profile: Path | None = None,
    gpus: int = 1,
) -> Recommendation:
    """What to make of a language model for a machine. The folder of the model may have its config.json and no weights.

    memory: as '8GB', of each GPU, None: all that the device has; context: tokens of one sequence, None: CONTEXT, or all that a
    shorter model has; profile: a folder of 'qkit profile'; gpus: how many share the model, in vLLM

    Raises UsageError for a context or a machine that makes no sense, Unsupported for what is no language model, BadInput for
    the profile of another model, and what opening the model raises.
    """
    machine = machine_of(memory, engine, device, gpus)
    folder = find_model(model, weights=False)
    if lacks_config(folder):
        raise BadCheckpoint(
            f"{folder}: no {CONFIG}, which says what the model is: get that file; weights are not needed"
        )
    if not is_config_alone(folder):
        return _recommend(model, model, context, machine, profile)
    with sketched(folder) as shapes:
        try:
            found = _recommend(str(shapes), model, context, machine, profile)
        except QkitError as e:
            raise type(e)(str(e).replace(str(shapes), str(folder))) from e
    has_tokenizer = any(name.startswith("tokenizer") for name in list_names(folder))

    def reason(refused: str) -> str:
        if not has_tokenizer and any(word in refused for word in ("tokenizer", "0 samples")):
            return _NO_TOKENIZER
        return refused.replace(str(shapes), str(folder))

    candidates = tuple(replace(c, refused=reason(c.refused)) for c in found.candidates)
    return replace(found, candidates=candidates, notes=(_SHAPES, *found.notes))


def _recommend(source: str, model: str, context: int | None, machine: Machine, profile: Path | None) -> Recommendation:
    """source: of the shapes; model: as the user names it"""
    gpus = machine.gpus
    structure = open_structure(source, language_for="qkit recommend")
    context = _context(structure, model, context)
    caches = _caches(structure, machine, context)
    activations = running_bytes(structure, context)[1] * gpus  # each has its own
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
        _with_cache(_of_scheme(request, machine, structure, whole), loss, caches, activations, machine)
        for request, loss in _asked(source, machine, known)
    ]
    no_mix = []
    if profile is not None:
        try:
            found.append(_mixed(source, machine, profile, caches, activations))
        except UsageError as e:
            no_mix.append(f"no mix of formats: {e}")
    chosen, why = choose(found)
    if chosen is not None and plain.fits and plain.total <= chosen.total:
        chosen, why = plain, "the model fits as it is, and no scheme takes less memory in this engine"
    return Recommendation(
        model=model,
        engine=machine.engine,
        device=None if machine.device is None else machine.device.name,
        gpus=gpus,
        memory=machine.memory,
        usable=machine.usable,
        context=context,
        evidence=evidence(known, profile),
        plain=plain,
        candidates=tuple(sorted(found, key=order)),
        chosen=chosen,
        why=why,
        tokens=tokens(chosen, machine, context),
        commands=() if chosen in (None, plain) else tuple(commands(model, context, machine, chosen, profile)),
        notes=(*no_mix, *notes(plain, found, chosen, machine, profile)),
        remedy="" if chosen else remedy(found, machine, context),
    )


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
        shape = CacheShape.of(config, windows=not gguf or getattr(config, "model_type", None) in _LLAMA_WINDOWS)
    except QkitError:  # attention that keeps something else
        latent = getattr(config, "kv_lora_rank", None)
        if latent:
            numbers = (latent + getattr(config, "qk_rope_head_dim", 0)) * config.num_hidden_layers
            return {plain: 2 * numbers * context * machine.gpus}  # no part of it can be split
        return {plain: running_bytes(structure, context)[0]}
    heads = 2 * max(shape.heads, machine.gpus) * sum(shape.tokens_of(context))  # of keys and values, all layers
    if gguf:
        return {name: int(heads * shape.head_dim * size) for name, size in _LLAMA_CACHES.items()}
    if machine.engine != "vllm" or machine.platform in _ONLY_PLAIN:
        return {PLAIN: int(heads * ENGINE_CACHES[PLAIN].bytes_of(shape.head_dim))}
    names = _CPU_CACHES if machine.platform == CPU else _VLLM_CACHES
    able = [name for name in names if not refusal(name, None, shape.head_dim)]
    return {name: int(heads * ENGINE_CACHES[name].bytes_of(shape.head_dim)) for name in able}


def _of_scheme(request: Request, machine: Machine, structure: ModelStructure, whole: int) -> Candidate:
    """Bytes of the weights in the engine, and whether and how it loads them. whole: bytes of the model as it is, which
    transformers makes of every packed file."""
    scheme = str(request.scheme)
    try:
        asked = replace(request, engine=machine.engine, gpu=machine.gpu, tp=machine.tp)
        prepared = prepare(asked, structure=structure)
    except QkitError as e:
        return Candidate(scheme=scheme, refused=str(e).removesuffix(f": {INSTEAD}"))
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
        values |= {"engine": machine.engine, "gpu": machine.gpu, "tp": machine.tp}
        try:
            budgeted = look_ahead(read_options(values, Path(out_of(model, MIXED)))).decided.budgeted
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
