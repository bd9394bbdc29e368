"""Which plans an engine that was asked for (--engine) allows: what it does not load is refused before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qkit.errors import Unsupported, UsageError
from qkit.families.structure import ModelStructure
from qkit.planning.gguf import GGUF
from qkit.tensor.formats import GGUF_SCHEMES, SCHEMES, Format, Scheme, fit_group, layout
from qkit.verification.engine_types import PLATFORMS
from qkit.verification.model_engines import Deployment, EngineLine, LinearStorage, engine_lines, engine_rows
from qkit.verification.vllm_table import CPU

if TYPE_CHECKING:
    from qkit.planning.plan import Plan
    from qkit.planning.recipe import Recipe

TITLES = {"vllm": "vLLM", "transformers": "transformers + compressed-tensors"}
LLAMA_CPP = "llama.cpp"
_SHOWN = 8  # schemes that a message names


def deployment(recipe: Mapping[str, Any]) -> Deployment:
    """What the result is to run on, by a recipe as a plan keeps it."""
    gpus = recipe.get("gpu")
    return Deployment(platforms=tuple(gpus.split(",")) if gpus else PLATFORMS, ranks=recipe.get("tp", 1))


def check_kind(recipe: Recipe, in_gguf: bool) -> None:
    """Raises UsageError where the engine that was asked for reads files of another kind."""
    if recipe.engine == LLAMA_CPP and not in_gguf:
        types = ", ".join(sorted(name.lower() for name in GGUF_SCHEMES))
        raise UsageError(f"--engine {LLAMA_CPP}: it reads GGUF files alone: use a type of GGUF as the scheme: {types}")
    if recipe.engine in TITLES and in_gguf:
        raise UsageError(
            f"--engine {recipe.engine}: scheme {recipe.scheme} makes a GGUF file, which is for {LLAMA_CPP}: use another "
            f"scheme, for instance w4a16, or --engine {LLAMA_CPP}"
        )


def check_engine(plan: Plan, structure: ModelStructure, lines: list[EngineLine]) -> None:
    """Raises Unsupported where the engine that was asked for does not load the result. lines: its engine table"""
    engine = plan.recipe["engine"]
    if engine not in TITLES or plan.export == GGUF:
        return
    line = next((line for line in lines if line.engine == TITLES[engine]), None)
    why = None if line is None else refused_by(line, plan.recipe)
    if why is None:
        return
    able = loadable_schemes(structure, plan)
    advice = f"it would load {', '.join(able)}" if able else "it loads no scheme of this model"
    raise Unsupported(f"--engine {engine}: {why}: {advice}")


def refused_by(line: EngineLine, recipe: Mapping[str, Any]) -> str | None:
    """Why an engine does not load a model where it was asked for; None where it does."""
    if not line.loads:
        where = f" on {recipe['gpu'].replace(',', ', ')}" if recipe.get("gpu") and line.platforms == () else ""
        return f"{line.engine} does not load this plan{where}: {line.notes[0] if line.notes else 'no reason known'}"
    if not line.platforms:
        return None
    asked = deployment(recipe).platforms if recipe.get("gpu") else ()
    lost = [gpu for gpu in asked if gpu not in line.platforms]
    if lost:
        own = next((n for n in line.notes if n.startswith(("not on", "no kernel"))), "it has no kernel for it")
        return f"{line.engine} does not load this plan on {', '.join(lost)}: {own}"
    if not asked and not set(line.platforms) - {CPU}:
        return f"{line.engine} loads this plan on no GPU: add --gpu {CPU}, for which it does"
    return None


def loadable_schemes(structure: ModelStructure, plan: Plan) -> list[str]:
    """Schemes that the engine of a plan would load with the shapes of its linears."""
    shapes = {name: p.shape for name, p in plan.linears.items()}
    names = []
    for scheme in SCHEMES.values():
        if scheme.name.startswith("6BIT"):
            continue
        parts = {name: storage for name, shape in shapes.items() if (storage := _stored(scheme, shape))}
        if len(parts) < len(shapes):
            continue
        if loads_in(plan.recipe, parts, structure.checkpoint.config):
            names.append(scheme.name.lower())
    weight_only = [n for n in names if n.endswith("a16") or "a16" not in n]
    return [n for n in names if n in weight_only][:_SHOWN]


def loads_in(recipe: Mapping[str, Any], parts: Mapping[str, LinearStorage], config: Mapping[str, Any]) -> bool:
    """Whether the engine that a recipe asks for loads these linears."""
    lines = engine_lines(engine_rows(parts, {}, config, "compressed-tensors", "", deployment(recipe)))
    line = next((line for line in lines if line.engine == TITLES.get(recipe["engine"])), None)
    return line is None or refused_by(line, recipe) is None


def _stored(scheme: Scheme, shape: tuple[int, int]) -> LinearStorage | None:
    try:
        weights: Format = fit_group(scheme.weights, shape[1])
    except Unsupported:
        return None
    if scheme.activations is not None and scheme.activations.group and shape[1] % scheme.activations.group:
        return None
    return LinearStorage(weights, scheme.activations, layout(weights, scheme.activations), shape)
