"""recipe.yaml of a result: everything that decides its bytes, as a recipe that makes them again.

It has the fields of a recipe (``planning.recipe``), and beside them what a command line says: calibration, seed, KV cache, call
of a pipeline. Rules and options are those that were decided, so that neither a profile nor a search is needed again. ``made``
says what with and of what, to tell in words why a run may give other bytes. No folder of the machine is in it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qkit.calibration.sources import CalibSource
from qkit.errors import BadRecipe, UsageError
from qkit.files.folder import hub_source
from qkit.files.hash_cache import cached_sha256
from qkit.files.schema import KvPolicy, complaint, validate
from qkit.files.side_files import RECIPE
from qkit.files.strictyaml import load_yaml, to_yaml
from qkit.kvcache.policy import CachePolicy
from qkit.planning.recipe import AUTO, FILE_LIMIT, Recipe
from qkit.system.version import __version__

if TYPE_CHECKING:
    from qkit.families.structure import ModelStructure
    from qkit.planning.plan import Plan
    from qkit.planning.request import Request

_LIBRARIES = ("torch", "transformers", "compressed-tensors")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class RecordedSource(_Part):
    """A source of calibration data: the name of a file, or a data set. sha256: of a file, None of a folder or a data set"""

    name: str
    column: str | None = None
    weight: float = 1.0
    sha256: str | None = None

    @property
    def words(self) -> str:
        """As --calib has it."""
        parts = [self.name, self.column, None if self.weight == 1 else f"{self.weight:g}"]
        return ":".join(part for part in parts if part is not None)


class RecordedCalibration(_Part):
    """Calibration samples. sources: none where the data comes with qkit; sha256: of the samples, as tokens"""

    samples: int | None = None
    seqlen: int | None = None
    synthetic_samples: int | None = None
    padded: bool = False
    answers_only: bool = False
    sources: tuple[RecordedSource, ...] = ()
    sha256: str | None = None

    @property
    def files(self) -> tuple[RecordedSource, ...]:
        """The sources that a user has, or has not."""
        return tuple(s for s in self.sources if not CalibSource(s.name).is_dataset)

    @property
    def named(self) -> str:
        """The data, for a person."""
        return ", ".join(s.words + (f" (sha256 {s.sha256[:12]})" if s.sha256 else "") for s in self.sources) or (
            "the data that comes with qkit"
        )


class Made(_Part):
    """What a result was made with, and of what. arithmetic: the dtype that blocks were run in; device: its kind"""

    versions: dict[str, str] = Field(default_factory=dict)
    arithmetic: str | None = None
    device: str = "cpu"
    model: dict[str, str] = Field(default_factory=dict)


class RecordedRun(_Part):
    """What a recipe file says beside its recipe. ``kv`` and ``key_exponents`` are those of a request."""

    calibration: RecordedCalibration = RecordedCalibration()
    seed: int | None = None
    kv: dict[str, Any] | None = None
    key_exponents: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    call: dict[str, Any] = Field(default_factory=dict)
    made: Made = Made()


def load_run(path: Path) -> RecordedRun:
    """What a recipe file says beside its recipe, which ``load_recipe`` reads. Raises BadRecipe naming the field."""
    data = load_yaml(path, "recipe", FILE_LIMIT)
    if not isinstance(data, Mapping):
        return RecordedRun()  # refused where the recipe is read
    data = {name: value for name, value in data.items() if name in RecordedRun.model_fields}
    try:
        run = RecordedRun.model_validate(data)
    except ValidationError as e:
        raise BadRecipe(f"{path}: {complaint(e, data)}: correct the file") from None
    try:
        _ = None if run.kv is None else CachePolicy.from_json(validate(KvPolicy, run.kv, "kv", error=UsageError))
    except UsageError as e:
        raise BadRecipe(f"{path}: {e}") from None
    return run


@dataclass(frozen=True)
class RecipeFile:
    """recipe.yaml, and the command line that reads it."""

    command: str
    content: bytes


def recipe_file(plan: Plan, request: Request, structure: ModelStructure, hashed: Mapping[str, str]) -> RecipeFile:
    """The recipe of a run. hashed: of the source (``source_hashes``)"""
    recipe = _explicit(Recipe.model_validate(plan.recipe))
    calibration = _calibration(plan, request)
    data: dict[str, Any] = {
        "scheme": recipe.scheme,
        "method": recipe.method,
        **recipe.model_dump(mode="json", exclude_defaults=True),
        **({} if calibration is None else {"calibration": calibration.model_dump(mode="json", exclude_defaults=True)}),
        "seed": plan.seed,
        **({} if plan.kv is None else {"kv": plan.kv}),
        **({} if plan.key_exponents is None else {"key_exponents": plan.key_exponents}),
        **({"call": request.call} if request.call else {}),
        "made": _made(plan, structure, hashed),
    }
    words = ["qkit", "quantize", "--model", hub_source(structure.checkpoint.path).get("repository", "MODEL")]
    words += ["--recipe", RECIPE]
    if calibration is not None and calibration.files:
        words += [word for source in calibration.sources for word in ("--calib", source.words)]
    command = "".join(c for c in shlex.join([*words, "--out", "OUT"]) if c.isprintable())
    head = f"# How this model was quantized by qkit {__version__}. This makes the same weights again:\n#   {command}\n"
    return RecipeFile(command, (head + to_yaml(data)).encode())


def run_notes(run: RecordedRun, plan: Plan) -> Iterator[str]:
    """What differs from the run that wrote the recipe, so that the bytes may differ too, a sentence each."""
    calibration, model = run.calibration, run.made.model
    if calibration.sha256 and plan.calibration is not None and plan.calibration.digest != calibration.sha256:
        yield (
            f"the calibration samples are not those of the recipe, which were of {calibration.named}: the result will not "
            "have the same bytes"
        )
    if model.get("fingerprint", plan.source_fingerprint) != plan.source_fingerprint:
        named = model.get("repository", f"the one of sha256 {model.get('sha256', '')[:12]}")
        yield f"the recipe was made for another model ({named}): the result will not have the same bytes"
    made = {**run.made.versions, **({"arithmetic": run.made.arithmetic} if run.made.arithmetic else {})}
    made |= {"device": run.made.device} if made else {}
    here = {**_versions(), "arithmetic": plan.run_dtype, "device": plan.torch_device.type}
    other = [f"{name} {made[name]} (here {here[name]})" for name in here if made.get(name, here[name]) != here[name]]
    if other:
        yield f"the recipe was made with {', '.join(other)}: the result may not have the same bytes"


def _explicit(recipe: Recipe) -> Recipe:
    """The recipe with its options written out, so that another default of a later version changes nothing. A search (auto)
    takes those of what it tries."""
    if AUTO in recipe.method.lower().split("+"):
        return recipe
    filled = recipe.model_copy(update={"options": {**recipe.options, **recipe.resolve(None)[2]}})
    rules = []
    for rule in recipe.rules:
        if rule.skip is None and not rule.keep:
            meant, found = recipe.resolve(rule)[2], filled.resolve(rule)[2]
            own = {name: value for name, value in meant.items() if found[name] != value}
            rule = rule.model_copy(update={"options": {**rule.options, **own}})
        rules.append(rule)
    return filled.model_copy(update={"rules": tuple(rules)})


def _calibration(plan: Plan, request: Request) -> RecordedCalibration | None:
    if plan.calibration is None:
        return None
    sources = tuple(
        RecordedSource(
            name=_name(source),
            column=source.column,
            weight=source.weight,
            sha256=cached_sha256(source.path) if source.path.is_file() else None,
        )
        for source in request.sources
    )
    return RecordedCalibration(
        samples=request.samples,
        seqlen=request.seqlen,
        synthetic_samples=request.written,
        padded=request.padded,
        answers_only=request.answers_only,
        sources=sources,
        sha256=plan.calibration.digest,
    )


def _name(source: CalibSource) -> str:
    """The name without folders of this machine; a data set may be one of these, too."""
    return Path(source.dataset[0]).name if source.is_dataset and Path(source.dataset[0]).exists() else source.name


def _made(plan: Plan, structure: ModelStructure, hashed: Mapping[str, str]) -> dict[str, Any]:
    adapter = structure.checkpoint.adapter
    model = {
        "type": plan.model_type,
        **hub_source(structure.checkpoint.path),
        **hashed,
        **({} if adapter is None else {"adapter": cached_sha256(adapter)}),
        "fingerprint": plan.source_fingerprint,
    }
    device = {} if plan.device == "cpu" else {"device": plan.torch_device.type}
    return {"versions": _versions(), "arithmetic": plan.run_dtype, **device, "model": model}


def _versions() -> dict[str, str]:
    return {"qkit": __version__, **{name: version(name) for name in _LIBRARIES}}
