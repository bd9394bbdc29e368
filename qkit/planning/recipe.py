"""The recipe of a user: a scheme, a method, and rules for the layers that differ.

A recipe file is YAML:

    scheme: w4a16
    method: gptq
    group_size: 64
    options: {damp: 0.02}
    rules:                       # the first rule whose glob matches a layer decides
      - match: "*.down_proj"
        scheme: w8a16
      - match: "model.layers.0.*"
        skip: the first block reacts strongly

Names come from qkit's own tables; nothing in a recipe is ever imported or run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from qkit.diffusion.policy import PolicyConfig
from qkit.errors import BadRecipe, UsageError
from qkit.files.schema import field_path
from qkit.files.strictyaml import LineDict, check_keys, load_yaml
from qkit.planning.renamed import current_names
from qkit.solvers.table import SOLVERS
from qkit.system.option import Options
from qkit.tensor.formats import GGUF_SCHEMES, Scheme, did_you_mean, scheme
from qkit.transforms.table import TRANSFORMS

Glob = Annotated[str, Field(min_length=1, max_length=200)]
MethodOptions = Annotated[dict[str, Any], AfterValidator(current_names)]
MOST_SPARSE = 20.0  # percent: beyond it a wider format takes less room
SOURCE = "source"  # as the format of an end: as the source stores it
ROW = -1  # as a group size: one scale for each row
AUTO = "auto"  # in a method: what comes in its place is found for every block (``qkit.engine.auto``)
FILE_LIMIT = 1 << 26  # bytes of a recipe file: that of a budget names every layer
TRIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("gptq", {"sweeps": 4, "compensate": 0.0}),
    "gptq, compensate 0.5": ("gptq", {"sweeps": 4, "compensate": 0.5}),
    "awq+gptq": ("awq+gptq", {"sweeps": 4}),
    "smoothquant+gptq": ("smoothquant+gptq", {"sweeps": 4}),
    "rtn": ("rtn", {}),
}


class Rule(BaseModel):
    """A choice for some layers, by a glob or a list of globs (fnmatch on the checkpoint name).

    keep: of a source that is quantized already: the layers stay as they are stored there, their numbers unchanged
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
    match: Glob | Annotated[tuple[Glob, ...], Field(min_length=1)]
    scheme: str | None = None
    solver: str | None = None
    group_size: int | None = None
    skip: str | None = None
    keep: bool = False
    options: MethodOptions = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_keep(self) -> Rule:
        if self.keep and (self.scheme or self.solver or self.group_size or self.skip or self.options):
            raise ValueError("keep leaves layers as the source stores them, and goes with no other choice for them")
        return self

    @property
    def globs(self) -> tuple[str, ...]:
        """``match`` as a list."""
        return (self.match,) if isinstance(self.match, str) else self.match

    def matches(self, name: str) -> bool:
        """Whether the rule is about the layer of that checkpoint name."""
        return any(fnmatchcase(name, glob) for glob in self.globs)


class Recipe(BaseModel):
    """A whole request, as a recipe file states it. ``method`` is a solver, a transform, or a sum such as smoothquant+gptq.

    targets: of a vision-language model, the choice for its towers: {vision: w8a8, projector: skip}; a scheme, "skip", or
    "auto": what measuring says (``planning.towers``). outliers: percent of a layer's weights, the largest, that are kept in
    16 bits in a sparse part; or {glob: percent}, of which the first that matches decides. rank: of the branch in 16 bits
    that makes up for what rounding took of a layer (``qkit.tensor.lowrank``), 0: none; or {glob: rank}. significant:
    percent of all weights that are put back to their values after quantization, those that the loss depends on most.
    expert_share: of all tokens, on which every routed expert is measured beside those that are sent to it; 1: all of them.
    prune_experts: the share of the routed experts of each block that is left out before anything is quantized.
    embeddings, head: the format of the two matrices at the ends of a language model (``planning.ends``), int8 or int4:32;
    None: they stay as they are. unloaded: that of matrices that the model's class does not
    load. policy: of a diffusion transformer with NVFP4 weights and inputs, precision by step:
    {width: 6, skips: 0.25}. engine: the one that has to load the result (``planning.engine_rules``); "any" lifts the rules of
    engines that load several layers as one (``planning.fused_layers``), and the plan then says which will not load the result.
    gpu: the kinds of GPU that have to run it, "sm80,sm90"; tp: how many GPUs share it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
    scheme: str
    method: str = "rtn"
    group_size: int | None = None
    strict: bool = False
    expert_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    prune_experts: Annotated[float, Field(ge=0, lt=1)] = 0.0
    export: Literal["compressed-tensors", "qkit", "gptq", "awq", "modelopt", "mlx"] | None = None
    engine: Literal["default", "vllm", "transformers", "llama.cpp", "any"] = "default"
    gpu: str | None = None
    tp: Annotated[int, Field(ge=1)] = 1
    options: MethodOptions = Field(default_factory=dict)
    outliers: float | dict[Glob, float] = 0.0
    rank: int | dict[Glob, int] = 0
    significant: Annotated[float, Field(ge=0, le=MOST_SPARSE)] = 0.0
    rules: tuple[Rule, ...] = ()
    embeddings: str | None = None
    unloaded: str | None = None
    head: str | None = None
    targets: dict[str, str] = Field(default_factory=dict)
    policy: PolicyConfig | None = None

    @model_validator(mode="after")
    def _check_outliers(self) -> Recipe:
        percentages = [self.outliers] if isinstance(self.outliers, float) else self.outliers.values()
        invalid = next((p for p in percentages if not 0 <= p <= MOST_SPARSE), None)
        if invalid is not None:
            raise ValueError(f"outliers {invalid:g}: expected a percentage from 0 to {MOST_SPARSE:g}")
        negative = next((r for r in ([self.rank] if isinstance(self.rank, int) else self.rank.values()) if r < 0), None)
        if negative is not None:
            raise ValueError(f"rank {negative}: expected 0, for none, or more")
        return self

    def outliers_of(self, name: str) -> float:
        """Percent of outliers of the layer of that checkpoint name."""
        return _for_layer(self.outliers, name)

    def rank_of(self, name: str) -> int:
        """Rank of the branch of the layer of that checkpoint name."""
        return int(_for_layer(self.rank, name))

    def resolve(self, rule: Rule | None) -> tuple[Scheme, str, dict[str, Any]]:
        """The scheme, the solver and the solver's options of a layer under its rule.

        What the top says holds wherever the rule says nothing else: its group size for every scheme that has groups of a
        free size, its options for every solver that has them. Raises UsageError for unknown names.
        """
        transforms, solver = parse_method(self.method)
        s, group = scheme(self.scheme), self.group_size
        if rule is not None:
            s = scheme(rule.scheme) if rule.scheme else s
            if rule.group_size is not None:
                group = rule.group_size
            elif rule.scheme and not s.weights.regroups:
                group = None
            solver = rule.solver or solver
        if group is not None and group != s.weights.group:
            s = Scheme(s.name, s.weights.with_group(group), s.activations)
        if solver not in SOLVERS:
            raise UsageError(f"unknown solver '{solver}'{did_you_mean(solver, list(SOLVERS))}")
        elsewhere = {o for name in self._solvers - {solver} for o in _options_of(name, ())}
        options_known = _options_of(solver, transforms)
        options = {k: v for k, v in self.options.items() if k in options_known or k not in elsewhere}
        return (
            s,
            solver,
            check_options(solver, transforms, {**options, **(rule.options if rule else {})}, s.weights.gguf),
        )

    @property
    def _solvers(self) -> set[str]:
        """All that layers may get, by the method and the rules."""
        named = {parse_method(self.method)[1], *(rule.solver for rule in self.rules if rule.solver)}
        return named & SOLVERS.keys()


def _for_layer(values: float | Mapping[str, float], name: str) -> float:
    """One value for every layer, or that of the first glob that matches; 0 where none does."""
    if not isinstance(values, Mapping):
        return values
    if name in values:  # an allocation names every layer
        return values[name]
    return next((value for glob, value in values.items() if fnmatchcase(name, glob)), 0.0)


@dataclass(frozen=True)
class RecipeTrial:
    """One recipe that is tried on a block. solvers: {linear: (solver, its options)}"""

    transforms: tuple[str, ...]
    solvers: dict[str, tuple[str, dict[str, Any]]]


def trial_recipes(recipe: Recipe, not_language: bool) -> dict[str, Recipe]:
    """The recipes that a method with 'auto' tries, {name: recipe}: those of TRIES that suit the scheme; empty for other
    methods. Options that are given go over those of the table, to each try those that it has; scales of narrow integers are
    signed, which costs nothing.

    not_language: a model that is no language model: its inputs would have to be scaled at run time, and its rows are of
    many shapes.
    """
    method_parts, base = recipe.method.lower().split("+"), scheme(recipe.scheme)
    if AUTO not in method_parts:
        return {}
    stages = [TRANSFORMS[part].stage for part in method_parts if part in TRANSFORMS and part != "residual"]
    narrow = base.weights.kind == "int" and base.weights.symmetric and base.weights.bits <= 4 and not base.weights.gguf
    recipes = {}
    for name, (method, options) in TRIES.items():
        has_transforms = bool(parse_method(method)[0])
        if (has_transforms and (not_language or "stats" in stages or base.weights.gguf)) or (
            options.get("compensate") and not_language
        ):
            continue
        trial_method = "+".join(method if part == AUTO else part for part in method_parts)
        parts, solver = parse_method(trial_method)
        accepted = _options_of(solver, parts)
        trial_options = {"signed": True} if narrow else {}
        trial_options.update(options, **{k: v for k, v in recipe.options.items() if k in accepted})
        recipes[name] = recipe.model_copy(update={"method": trial_method, "options": trial_options})
    return recipes


def rule_for(name: str, rules: tuple[Rule, ...]) -> tuple[int, Rule | None]:
    """The place of the first rule about the layer of that checkpoint name, and the rule; (-1, None) if there is none."""
    for i, rule in enumerate(rules):
        if rule.matches(name):
            return i, rule
    return -1, None


def check_rules(recipe: Recipe, matched: set[int], names: list[str]) -> None:
    """Raises BadRecipe for a rule that decided nothing. matched: places of those that did; names: of all layers."""
    for i, rule in enumerate(recipe.rules):
        if i not in matched:
            which = f"--keep-source (keep: true) {rule.match!r}" if rule.keep else f"rule {i + 1} ({rule.match!r})"
            if any(rule.matches(n) for n in names):
                raise BadRecipe(
                    f"{which} matches only layers that an earlier rule or a default "
                    "already decides: move the rule up or remove it"
                )
            leaf, leaves = rule.globs[0].rpartition(".")[2], sorted({n.rpartition(".")[2] for n in names})
            raise BadRecipe(f"{which} matches no layer{did_you_mean(leaf, leaves)}")


def parse_method(method: str) -> tuple[tuple[str, ...], str]:
    """The transforms and the solver of a method: 'smoothquant+gptq' -> (('smoothquant',), 'gptq'). The solver defaults to
    rtn.

    Raises UsageError for an unknown part or for two solvers.
    """
    transforms: list[str] = []
    solvers: list[str] = []
    for part in method.lower().split("+"):
        if part in SOLVERS or part == AUTO:
            solvers.append(part.replace(AUTO, next(iter(TRIES))))  # the first that is tried stands for all of them
        elif part in TRANSFORMS:
            transforms.append(part)
        elif part == "requant":
            raise UsageError(
                f"method '{method}': requant is a search before planning: use it with --method of 'qkit quantize'"
            )
        else:
            names = [*SOLVERS, AUTO, *TRANSFORMS]
            raise UsageError(
                f"unknown method '{part}' in '{method}'{did_you_mean(part, names)} ('qkit list methods' shows all)"
            )
    if len(solvers) > 1 or len(set(transforms)) < len(transforms):
        raise UsageError(f"method '{method}': expected at most one solver ({', '.join(SOLVERS)}) and no repetition")
    ordered = tuple(t for t in TRANSFORMS if t in transforms)
    return ordered, solvers[0] if solvers else "rtn"


def check_options(
    solver: str, transforms: tuple[str, ...], options: dict[str, Any], gguf: bool = False
) -> dict[str, Any]:
    """The options with the defaults of the solver and the transforms filled in. gguf: for a type of GGUF.

    Raises UsageError for unknown names and for values of another type or out of range.
    """
    table = _options_of(solver, transforms)
    filled = {name: o.default if o.gguf is None or not gguf else o.gguf for name, o in table.items()}
    for name, value in options.items():
        if name not in table:
            has = f": it has {', '.join(table) or 'no options'}"
            owners = [method for method, x in (SOLVERS | TRANSFORMS).items() if name in x.options]
            elsewhere = f"{has}; {name} is an option of {' and '.join(owners)}" if owners else ""
            known = elsewhere or did_you_mean(name, list(table)) or has
            raise UsageError(f"unknown option '{name}' for {'+'.join((*transforms, solver))}{known}")
        filled[name] = table[name].checked(name, value)
    return filled


def _options_of(solver: str, transforms: tuple[str, ...]) -> Options:
    table = dict(SOLVERS[solver].options)
    for t in transforms:
        table.update(TRANSFORMS[t].options)
    return table


def parse_end(text: str, option: str) -> Scheme:
    """The scheme of what is outside the blocks, of 'int8', 'int4' or 'int4:32', with the number of weights that share a
    scale.

    Eight bits need one scale a row; narrower ones have the groups of their scheme. Only integers without zero points: engines
    look rows up in no other format. Raises UsageError.
    """
    if text == AUTO and option != "unloaded":
        raise UsageError(f"--{option} {AUTO}: a budget decides it: add --bits, --size or --memory, or name a format")
    name, colon, group = text.strip().lower().partition(":")
    if name.upper() in GGUF_SCHEMES and not colon:
        return GGUF_SCHEMES[name.upper()]
    names = [f"int{bits}" for bits in range(2, 9)]
    if name not in names:
        raise UsageError(
            f"--{option} {text}: expected int2 to int8, for instance int8, or int4:32 with the group size"
            f"{did_you_mean(name, names)}"
        )
    found = scheme(f"W{name.removeprefix('int')}A16")
    if not colon:
        size = ROW if name == "int8" else found.weights.group
    elif group.removeprefix("-").isdecimal() and (int(group) >= 1 or int(group) == ROW) and len(group) < 10:
        size = int(group)
    else:
        raise UsageError(
            f"--{option} {text}: expected a group size behind the colon, 1 or more, or -1 for a scale a row"
        )
    assert size is not None
    return Scheme(found.name, found.weights.with_group(size))


def load_recipe(path: Path, overrides: dict[str, Any], beside: Iterable[str] = ()) -> Recipe:
    """A recipe file with command-line values put over it, options of the method one by one. With another method, those of the
    file that it has not are left out.

    beside: what else may stand in the file, for others to read. Raises BadRecipe naming file, line and key.
    """
    data = load_yaml(path, "recipe", FILE_LIMIT)
    if not isinstance(data, LineDict):
        raise BadRecipe(
            f"{path}: expected a mapping with 'scheme' and 'method' at the top, found {type(data).__name__}"
        )
    check_keys(data, [*Recipe.model_fields, *beside], str(path))
    data = LineDict({name: value for name, value in data.items() if name in Recipe.model_fields})
    rules, options = data.get("rules"), data.get("options")
    for rule in rules if isinstance(rules, list) else []:  # anything else is refused with the other fields
        if isinstance(rule, LineDict):
            check_keys(rule, list(Rule.model_fields), str(path))
    if isinstance(options, dict):
        found, method = current_names(options), overrides.get("method")
        if method is not None and data.get("method") not in (None, method):  # another method has options of its own
            transforms, solver = parse_method(method)
            known = _options_of(solver, transforms)
            found = {name: value for name, value in found.items() if name in known}
        data["options"] = {**found, **current_names(overrides.get("options", {}))}
        overrides = {name: value for name, value in overrides.items() if name != "options"}
    return make_recipe({**data, **overrides}, str(path))


def make_recipe(data: dict[str, Any], where: str) -> Recipe:
    """A validated recipe. Raises BadRecipe with the field, in one sentence."""
    try:
        recipe = Recipe.model_validate(data)
        parse_method(recipe.method)
        for rule in (None, *recipe.rules):
            recipe.resolve(rule)
        for option in ("embeddings", "head", "unloaded"):
            if getattr(recipe, option) not in (None, SOURCE):
                parse_end(getattr(recipe, option), option)
    except ValidationError as e:
        first = e.errors()[0]
        field = ".".join(map(str, field_path(first["loc"], data) or first["loc"]))
        if not first["loc"] or (first["type"] == "value_error" and first["loc"][0] == "rules"):
            raise BadRecipe(f"{where}: {first['ctx']['error']}") from e
        if first["type"] == "extra_forbidden" and first["loc"][0] == "policy":
            name, fields = str(first["loc"][-1]), list(PolicyConfig.model_fields)
            raise BadRecipe(
                f"{where}: no policy '{name}', expected one of {', '.join(fields)}{did_you_mean(name, fields)}"
            ) from e
        raise BadRecipe(f"{where}: field '{field}': {first['msg']} (found {first.get('input')!r})") from e
    except UsageError as e:
        raise type(e)(f"{where}: {e}" if where != "command line" else str(e)) from e
    return recipe
