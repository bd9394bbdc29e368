"""Which plans an engine that was asked for (--engine) allows: what it does not load is refused before anything is computed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qkit.diffusion.policy import BY_STEP
from qkit.errors import Unsupported, UsageError
from qkit.families.structure import ModelStructure
from qkit.planning.gguf import GGUF
from qkit.tensor.formats import GGUF_SCHEMES, SCHEMES, Format, Scheme, fit_group, layout
from qkit.verification.engine_types import PLATFORMS
from qkit.verification.model_engines import Deployment, EngineLine, LinearStorage, engine_lines, engine_rows
from qkit.verification.vllm_fit import LOADS_ON
from qkit.verification.vllm_table import CPU

if TYPE_CHECKING:
    from qkit.planning.linear_plan import LinearPlan
    from qkit.planning.plan import Plan
    from qkit.planning.recipe import Recipe

TITLES = {"vllm": "vLLM", "transformers": "transformers + compressed-tensors"}
LLAMA_CPP = "llama.cpp"
_RUN = re.compile(r"w(\d)a16(\w*)")  # schemes that a message names as one, from the fewest bits to the most


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
    if line is None or why is None:
        return
    raise Unsupported(f"--engine {engine}: {why}{others_that_load(line, lines)}: {_advice(plan, structure)}")


def unloaded_warning(plan: Plan, structure: ModelStructure, lines: Iterable[EngineLine]) -> str | None:
    """What to say of a plan without --engine that no engine loads on a GPU, or that vLLM does not load on the GPUs of --gpu;
    None where there is nothing to say, as for engines that a model is not for."""
    if plan.recipe["engine"] in TITLES or plan.export in (GGUF, "mlx"):
        return None
    asked = [line for line in lines if line.engine in TITLES.values()]
    reasons = {line.engine: why for line in asked if (why := refused_by(line, plan.recipe))}
    if not reasons or (len(reasons) < len(asked) and not (plan.recipe.get("gpu") and TITLES["vllm"] in reasons)):
        return None
    nowhere = "no engine loads the result on a GPU: " if len(reasons) == len(asked) else ""
    return f"{nowhere}{'; '.join(reasons.values())}: {_advice(plan, structure)}"


def _advice(plan: Plan, structure: ModelStructure) -> str:
    """What to change in a plan so that the engine that was asked for, else vLLM, loads the result."""
    recipe = {**plan.recipe, "engine": plan.recipe["engine"] if plan.recipe["engine"] in TITLES else "vllm"}
    if plan.own_method is not None:
        return f"leave out what asks for qkit's own method ({plan.own_method}), or use qkit.load"
    if plan.export == "qkit":
        return "leave --export qkit out, or use qkit.load"
    able = loadable_schemes(structure, plan.linears, recipe)
    if not able and recipe["tp"] > 1 and loadable_schemes(structure, plan.linears, {**recipe, "tp": 1}):
        return f"use another number than --tp {recipe['tp']}"
    if not able:
        return f"{TITLES[recipe['engine']]} loads no scheme of this model"
    if plan.recipe["scheme"].upper() in {scheme.name for scheme in able}:
        return f"scheme {plan.recipe['scheme']} is not the reason, and may stay"
    return f"schemes that {TITLES[recipe['engine']]} loads for this model: {named(able)}"


def named(schemes: Iterable[Scheme]) -> str:
    """All schemes, by the bits of inputs: 'inputs in 16 bits: w2a16 to w8a16, nvfp4a16; in 8 bits: w8a8'."""
    groups: dict[int, list[str]] = {}
    for scheme in schemes:
        groups.setdefault(16 if scheme.activations is None else scheme.activations.bits, []).append(scheme.name.lower())
    texts = [f"in {bits} bits: {', '.join(_runs(names))}" for bits, names in sorted(groups.items(), reverse=True)]
    return "inputs " + "; ".join(texts)


def _runs(names: Sequence[str]) -> list[str]:
    """Names in which 'w2a16 to w4a16' stands for three; the others stay as they are."""
    runs: list[list[str]] = []
    for name in names:
        found, last = _RUN.fullmatch(name), _RUN.fullmatch(runs[-1][-1]) if runs else None
        if found and last and (int(found[1]), found[2]) == (int(last[1]) + 1, last[2]):
            runs[-1].append(name)
        else:
            runs.append([name])
    return [part for run in runs for part in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else run)]


def others_that_load(refusing: EngineLine, lines: Iterable[EngineLine]) -> str:
    """'; transformers and qkit load it': what follows the refusal of one engine."""
    others = [line.engine for line in lines if line.loads and line.engine != refusing.engine]
    return f"; {' and '.join(others)} load{'s' * (len(others) == 1)} it" if others else ""


def refused_by(line: EngineLine, recipe: Mapping[str, Any], what: str = "this plan") -> str | None:
    """Why an engine does not load a model where it was asked for; None where it does."""
    if not line.loads:
        where = f" on {recipe['gpu'].replace(',', ', ')}" if recipe.get("gpu") and line.platforms == () else ""
        elsewhere = "".join(f"; {note}" for note in line.notes if note.startswith(LOADS_ON))
        reason = _reason(line.notes[0]) if line.notes else "no reason known"
        return f"{line.engine} does not load {what}{where}: {reason}{elsewhere}"
    if not line.platforms:
        return None
    asked = deployment(recipe).platforms if recipe.get("gpu") else ()
    lost = [gpu for gpu in asked if gpu not in line.platforms]
    if lost:
        own = next((n for n in line.notes if n.startswith(("not on", "no kernel"))), "it has no kernel for it")
        return (
            f"{line.engine} does not load {what} on {', '.join(lost)}: {_reason(own)}; {LOADS_ON} "
            f"{', '.join(line.platforms)}"
        )
    if not asked and not set(line.platforms) - {CPU}:
        return f"{line.engine} loads {what} on no GPU: add --gpu {CPU}, for which it does"
    return None


def _reason(note: str) -> str:
    """A note without the GPUs that it is about, which the sentence around it names."""
    return note.partition(": ")[2] if note.startswith("not on") else note


def loadable_schemes(
    structure: ModelStructure, linears: Mapping[str, LinearPlan], recipe: Mapping[str, Any]
) -> list[Scheme]:
    """Schemes that the engine of a recipe would load with the shapes of these linears."""
    able = []
    for scheme in SCHEMES.values():
        parts = {name: storage for name, p in linears.items() if (storage := _stored(scheme, p.shape))}
        by_step = scheme.name == BY_STEP  # of diffusion transformers
        if not by_step and len(parts) == len(linears) and loads_in(recipe, parts, structure.checkpoint.config):
            able.append(scheme)
    return able


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
