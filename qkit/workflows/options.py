"""The options of quantize and plan, read: names and numbers are checked here, before torch is imported.

The command line and ``qkit.quantize`` have the same options by the same names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qkit.allocation.limits import CANDIDATES, MEASURE, BudgetRequest, parse_budget, parse_bytes
from qkit.calibration.sources import parse_sources
from qkit.engines.selector import parse_gpus
from qkit.errors import UsageError
from qkit.files.locate import find_model
from qkit.files.sources.lora import is_adapter
from qkit.kvcache.policy import CacheRequest, parse
from qkit.planning.quality import names_method, preferred
from qkit.planning.quality_levels import DEFAULT
from qkit.planning.recipe import MOST_SPARSE, Recipe
from qkit.planning.recipe_file import RecordedRun, load_run
from qkit.planning.request import REQUANT, Request, is_requant, recipe_of
from qkit.sensitivity.candidates import GGUF, parse_candidates
from qkit.sensitivity.names import PROFILE
from qkit.tensor.formats import GGUF_SCHEMES

BUDGETS = ("bits", "size", "memory", "latency")
WAYS = "--bits, --size, --memory or --latency"
_OF_BUDGETS = (*BUDGETS, "profile", "candidates", "measure", "floors", "ceilings", "refine")
_OF_CACHES = ("kv", "kv_memory", "max_length", "kv_scale_keys")
DEFAULTS: dict[str, Any] = {
    **dict.fromkeys((*BUDGETS, "profile", "candidates")),
    "measure": MEASURE,
    "floors": (),
    "ceilings": (),
    "refine": 0,
    **dict.fromkeys(("kv", "kv_memory", "max_length")),
    "kv_scale_keys": False,
    "base": None,
    "revision": None,
    "require_revision": False,
    **dict.fromkeys(
        ("scheme", "method", "quality", "group_size", "recipe", "outliers", "rank", "significant", "effort", "export")
    ),
    "keep_source": (),
    **dict.fromkeys(("engine", "gpu", "tp")),
    **dict.fromkeys(("embeddings", "head", "unloaded")),
    "options": (),
    "call": (),
    "policy": (),
    "targets": (),
    "rows_memory": None,
    "strict": False,
    "calibrate_all_experts": False,
    "expert_share": None,
    "prune_experts": None,
    "calib": (),
    **dict.fromkeys(("samples", "seqlen", "synthetic_samples")),
    "padded": False,
    "answers_only": False,
    "seed": None,
    "threads": None,
    "device": "auto",
}


@dataclass(frozen=True)
class QuantizeOptions:
    """Options that were read. budget, cache: where they are given; a cache that shares the budget is in the budget; quality:
    the level that chooses a method where the request names none."""

    request: Request
    budget: BudgetRequest | None
    cache: CacheRequest | None
    quality: str = DEFAULT


def read_options(values: Mapping[str, Any], out: Path) -> QuantizeOptions:
    """The request of options by name; ``model`` and all of DEFAULTS.

    out: beside it goes the profile, where no profile is given. Raises UsageError and BadRecipe for what is wrong with names and
    numbers alone.
    """
    given = dict(values)
    level = given.pop("quality")
    read = replace(_read(given, out), quality=level or DEFAULT)
    request = read.request
    if read.budget is None or request.scheme or request.recipe:
        if not names_method(request):
            recipe = recipe_of(preferred(request, read.quality))
        else:
            parts = [p for p in (request.method or "").lower().split("+") if p and p != REQUANT]
            recipe = recipe_of(
                replace(request, method="+".join(parts) or ("rtn" if is_requant(request.method) else None))
            )
        _check_pruning(recipe, request, read.budget)
    if level is not None and names_method(request):
        where = f"--method {request.method}" if request.method else f"the method in {request.recipe}"
        raise UsageError(f"--quality {level} chooses the method, and {where} names one: leave one of the two out")
    if read.budget is not None and read.budget.candidates:
        parse_candidates(read.budget.candidates, request.group_size)
    return read


def _check_pruning(recipe: Recipe, request: Request, budget: BudgetRequest | None) -> None:
    """Raises UsageError where layers are measured before experts are left out, which changes what is there."""
    if recipe.prune_experts and (budget is not None or is_requant(request.method)):
        other = "method requant" if budget is None else f"a budget ({WAYS})"
        raise UsageError(
            f"--prune-experts {recipe.prune_experts:g} and {other} exclude each other: leave experts out with a scheme of the "
            "source's own width first, or use --scheme"
        )


def _read(values: dict[str, Any], out: Path) -> QuantizeOptions:
    of_budget = {name: values.pop(name) for name in _OF_BUDGETS}
    cache = cache_request({name: values.pop(name) for name in _OF_CACHES})
    budget = parse_budget(of_budget["bits"], of_budget["size"], of_budget["memory"], of_budget["latency"])
    request = make_request(values)
    if budget is None:
        for name in ("profile", "candidates", "floors", "ceilings", "refine"):
            if of_budget[name]:
                raise UsageError(f"--{name.removesuffix('s')} goes with a budget: add {WAYS}")
        return QuantizeOptions(request, None, cache)
    if request.keep_source:
        raise UsageError(
            f"--keep-source {request.keep_source[0]}: a budget decides over every layer: leave it out, or use --scheme"
        )
    if is_requant(request.method):
        raise UsageError(
            "method requant and a budget exclude each other: add sparse formats to --candidates (int3+0.5%)"
        )
    profile: Path | None = of_budget["profile"]
    if profile is not None and profile.name == PROFILE and profile.is_file():
        profile = profile.parent
    shared, default = budget.memory is not None, CANDIDATES
    if request.scheme is not None and request.scheme.upper() in GGUF_SCHEMES:  # says what kind of file is asked for
        request, default = replace(request, scheme=None), GGUF
    budget_request = BudgetRequest(
        budget=budget,
        profile=profile or out.with_name(out.name + ".profile"),
        candidates=of_budget["candidates"],
        default=default,
        measure=of_budget["measure"],
        floors=_bounds("--floor", of_budget["floors"]),
        ceilings=_bounds("--ceiling", of_budget["ceilings"]),
        evaluations=of_budget["refine"],
        named=profile is not None,
        cache=cache if shared else None,
    )
    return QuantizeOptions(request, budget_request, None if shared else cache)


def cache_request(options: Mapping[str, Any]) -> CacheRequest | None:
    """The KV cache of options; None: a plain one. Raises UsageError for options of a cache that is not there."""
    if options["kv"] is None:
        lost = next((n for n in _OF_CACHES if options[n]), None)
        if lost is not None:
            raise UsageError(f"--{lost.replace('_', '-')} needs --kv: add it, or leave this option out")
        return None
    parse(options["kv"])
    memory = None if options["kv_memory"] is None else parse_bytes(options["kv_memory"], "--kv-memory")
    return CacheRequest(options["kv"], memory, options["max_length"], options["kv_scale_keys"])


def make_request(options: dict[str, Any]) -> Request:
    """The Request of options. Raises UsageError for values out of range."""
    flags = {"option": "options", "call": "call", "policy": "policy"}
    method_options, call, policy = (_by_name(f"--{flag}", options.pop(key)) for flag, key in flags.items())
    targets = _targets(options.pop("targets"))
    if options["threads"] is not None and options["threads"] < 1:
        raise UsageError(f"--threads {options['threads']}: expected at least 1")
    for name in ("outliers", "significant"):
        if options[name] is not None and not 0 <= options[name] <= MOST_SPARSE:
            raise UsageError(f"--{name} {options[name]:g}: expected a percentage from 0 to {MOST_SPARSE:g}")
    if options["prune_experts"] is not None and not 0 < options["prune_experts"] < 1:
        raise UsageError(
            f"--prune-experts {options['prune_experts']:g}: expected a share of the experts between 0 and 1, for instance 0.25"
        )
    share = options["expert_share"]
    if share is not None and not 0 < share <= 1:
        raise UsageError(f"--expert-share {share:g}: expected a share of the tokens above 0, up to 1, for instance 0.1")
    if share is not None and options["calibrate_all_experts"]:
        raise UsageError(
            "--expert-share and --calibrate-all-experts, which is a share of 1, exclude each other: use one"
        )
    if options["rank"] is not None and options["rank"] < 0:
        raise UsageError(f"--rank {options['rank']}: expected 0, for none, or more")
    if options["tp"] is not None and options["tp"] < 1:
        raise UsageError(f"--tp {options['tp']}: expected at least 1")
    options["gpu"] = None if options["gpu"] is None else ",".join(parse_gpus(options["gpu"]))
    revision, required = options.pop("revision"), options.pop("require_revision")
    if revision is not None or required:
        options["model"] = str(find_model(options["model"], revision, required))
    options["calib"] = options["calib"] or None
    _fill_in(options, call)
    parse_sources(options["calib"])
    base = options.pop("base")
    if base is not None:
        options["model"], options["adapter"] = _with_base(options["model"], base)
    rows = options.pop("rows_memory")
    options["rows_memory"] = None if rows is None else parse_bytes(rows, "--rows-memory")
    kept = options.pop("keep_source")
    options["keep_source"] = (kept,) if isinstance(kept, str) else tuple(kept)
    return Request(options=method_options, call=call, policy=policy, targets=targets, **options)


def _fill_in(options: dict[str, Any], call: dict[str, Any]) -> None:
    """What was not given: from the recipe file, else by default."""
    run = options["recorded"] = None if options["recipe"] is None else load_run(options["recipe"])
    recorded = RecordedRun() if run is None else run
    calibration = recorded.calibration
    for name, default in (("samples", 128), ("seqlen", 256), ("synthetic_samples", None)):
        found = getattr(calibration, name)
        options[name] = next((x for x in (options[name], found) if x is not None), default)
    for name in ("padded", "answers_only"):
        options[name] = options[name] or getattr(calibration, name)
    if options["seed"] is None:
        options["seed"] = recorded.seed or 0
    if options["calib"] is None and not calibration.files:
        options["calib"] = tuple(source.words for source in calibration.sources) or None
    options["kv"], options["key_exponents"] = recorded.kv, recorded.key_exponents
    call.update({name: value for name, value in recorded.call.items() if name not in call})


def _with_base(adapter: str, base: str) -> tuple[str, str]:
    """(the model to open, the adapter to merge into it). Raises UsageError where --model is no adapter."""
    folder = find_model(adapter)
    if not is_adapter(folder):
        raise UsageError(
            f"--base {base}: it is for an adapter (LoRA) as --model, and {adapter} has no adapter_config.json: leave it out"
        )
    return base, str(folder)


def _targets(items: Mapping[str, str] | Sequence[str]) -> dict[str, str] | None:
    if isinstance(items, Mapping):
        return dict(items) or None
    targets = [item.partition("=") for item in items]
    for name, equals, value in targets:
        if not equals or not value:
            raise UsageError(f"--target {name}: expected PART=SCHEME, for instance vision=w8a8")
    return {name: value for name, _, value in targets} or None


def _by_name(flag: str, items: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """{name: value} of NAME=VALUE; from Python also as it is."""
    if isinstance(items, Mapping):
        return dict(items)
    values: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"{flag} {item}: expected NAME=VALUE")
        if name in values:
            raise UsageError(f"{flag} {name}= is given twice, with {values[name]} and {value}: use it once")
        values[name] = _literal(value)
    return values


def _literal(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def _bounds(option: str, items: Mapping[str, str] | Sequence[str]) -> tuple[tuple[str, str], ...]:
    bounds = []
    for item in [f"{k}={v}" for k, v in items.items()] if isinstance(items, Mapping) else items:
        glob, equals, name = item.rpartition("=")
        if not equals or not glob:
            raise UsageError(f"{option} {item}: expected GLOB=FORMAT, for instance '*.down_proj=int4'")
        bounds.append((glob, parse_candidates(name, None, option)[0].name))
    return tuple(bounds)
