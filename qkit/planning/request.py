"""The request of ``qkit quantize``. This file reads no model and imports no torch, so that a wrong command fails at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qkit.calibration.sources import CalibSource, Given, parse_sources
from qkit.errors import UsageError
from qkit.planning.recipe import Recipe, Rule, load_recipe, make_recipe, parse_method
from qkit.planning.recipe_file import RecordedRun
from qkit.planning.renamed import current_names
from qkit.transforms.table import EFFORTS, TRANSFORMS

REQUANT = "requant"  # a method that searches before anything is planned
REQUANT_OUTLIERS, REQUANT_SIGNIFICANT = 0.45, 0.05  # percent, of the paper's SqueezeLLM runs


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of ``qkit quantize``.

    adapter: the folder of an adapter (LoRA) that is merged into the model.
    calib: the calibration data, one source or several, as ``calibration.sources`` reads them; None: the embedded data.
    samples x seqlen tokens of it are used where the method needs any, and ``synthetic_samples`` rows more, which the model
    writes itself; None: as many as the level of quality asks for, else none. padded: a row for each record; answers_only:
    only tokens of answers count. recipe: a YAML file; scheme, method, group_size and options given here go over it. rules:
    as in a recipe, what an allocation decided. effort: a name of EFFORTS, options of learned rounding. outliers, rank,
    significant, embeddings, head, targets, engine, gpu, tp: as in a recipe; None: what the recipe says. keep_source: globs
    of layers that stay as a quantized source stores them, before all rules. call: of a diffusion pipeline, what it is
    called with while it is calibrated; its calib are prompts, one a line, and rows_memory the bytes that rows may use in
    memory; policy: as in a recipe. kv: the KV cache policy that the result is to be run with, as ``Policy.to_json`` gives
    it; key_exponents: as in a plan. recorded: what the recipe file says of the run that wrote it.
    """

    model: str
    adapter: str | None = None
    scheme: str | None = None
    method: str | None = None
    group_size: int | None = None
    recipe: Path | None = None
    rules: tuple[dict[str, Any], ...] = ()
    keep_source: tuple[str, ...] = ()
    outliers: float | dict[str, float] | None = None
    rank: int | dict[str, int] | None = None
    significant: float | None = None
    embeddings: str | None = None
    unloaded: str | None = None
    head: str | None = None
    targets: dict[str, str] | None = None
    effort: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    rows_memory: int | None = None
    strict: bool = False
    calibrate_all_experts: bool = False
    expert_share: float | None = None
    prune_experts: float | None = None
    export: str | None = None
    engine: str | None = None
    gpu: str | None = None
    tp: int | None = None
    calib: Given = None
    samples: int = 128
    seqlen: int = 256
    synthetic_samples: int | None = None
    padded: bool = False
    answers_only: bool = False
    seed: int = 0
    threads: int | None = None
    device: str = "auto"
    kv: dict[str, Any] | None = None
    key_exponents: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    recorded: RecordedRun | None = None

    @property
    def written(self) -> int:
        """Number of calibration rows that the model writes itself."""
        return self.synthetic_samples or 0

    @property
    def sources(self) -> tuple[CalibSource, ...]:
        """The sources of calibration data that were named. Raises UsageError for one that says nothing."""
        return parse_sources(self.calib)

    def only_source(self, what: str) -> Path | None:
        """The path of the one source, None where none is named. Raises UsageError for several, or one with a column."""
        if not self.sources:
            return None
        first, *others = self.sources
        if others or first.column is not None or first.weight != 1:
            raise UsageError(
                f"--calib {' --calib '.join(s.name for s in self.sources)}: {what} are read from one file or folder, without "
                "column and weight: use one"
            )
        return first.path


def recipe_of(request: Request) -> Recipe:
    """The recipe of a request: its file, if there is one, with the options of the request over it."""
    settings = {
        "scheme": request.scheme,
        "method": request.method,
        "group_size": request.group_size,
        "strict": request.strict or None,
        "expert_share": 1.0 if request.calibrate_all_experts else request.expert_share,
        "prune_experts": request.prune_experts,
        "export": request.export,
        "engine": request.engine,
        "gpu": request.gpu,
        "tp": request.tp,
        "options": request.options or None,
        "rules": request.rules or None,
        "outliers": request.outliers,
        "rank": request.rank,
        "significant": request.significant,
        "embeddings": request.embeddings,
        "unloaded": request.unloaded,
        "head": request.head,
        "targets": request.targets or None,
        "policy": request.policy or None,
    }
    overrides = {k: v for k, v in settings.items() if v is not None}
    if request.recipe is None and request.scheme is None:
        raise UsageError(
            "no scheme: add --scheme (for instance w4a16) or --recipe FILE ('qkit list schemes' shows all)"
        )
    recipe = (
        make_recipe(overrides, "command line")
        if request.recipe is None
        else load_recipe(request.recipe, overrides, RecordedRun.model_fields)
    )
    kept = tuple(Rule(match=glob, keep=True) for glob in request.keep_source)
    recipe = recipe.model_copy(update={"rules": (*kept, *recipe.rules)}) if kept else recipe
    if request.effort is None:
        return recipe
    if not any(TRANSFORMS[t].stage == "block" for t in parse_method(recipe.method)[0]):
        raise UsageError(
            f"--effort is for learned rounding, and method '{recipe.method}' has none: use signround, or "
            "SOLVER+signround, or leave --effort out"
        )
    return recipe.model_copy(
        update={"options": {**recipe.options, **EFFORTS[request.effort], **current_names(request.options)}}
    )


def check_rows(request: Request, least: int = 1) -> None:
    """Raises UsageError for numbers of calibration rows that are out of range. least: samples that are needed"""
    if request.written < 0:
        raise UsageError(f"--synthetic-samples {request.synthetic_samples}: expected 0 or more")
    if request.samples < 0 or request.samples + request.written < least or request.seqlen < 2:
        without = " (or --synthetic-samples, which need no data)" if request.samples == 0 else ""
        raise UsageError(
            f"--samples {request.samples} --seqlen {request.seqlen}: expected at least {least} sample{without} of at least 2 "
            "tokens"
        )
    if request.samples == 0 and (request.calib is not None or request.padded or request.answers_only):
        given = "--calib" if request.calib is not None else "--padded" if request.padded else "--answers-only"
        raise UsageError(
            f"--samples 0 {given}: without samples no data is read: leave {given} out, or use more samples"
        )
    if request.answers_only and request.calib is None:
        raise UsageError("--answers-only: the embedded data has texts without answers: add --calib with chats")


def is_requant(method: str | None) -> bool:
    """Whether a method string asks for ReQuant."""
    return REQUANT in (method or "").lower().split("+")
