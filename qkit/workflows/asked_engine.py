"""What vLLM's own code says of a result, or of a plan before anything is quantized (``--engine vllm --python``)."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from qkit.engine.export import quantization_config
from qkit.engines.process import TIMEOUT, EngineRefusal
from qkit.engines.selector import ModelChoice, ask
from qkit.errors import Unsupported
from qkit.families.structure import ModelStructure
from qkit.planning.gguf import GGUF
from qkit.planning.plan import Plan
from qkit.system.progress import Progress
from qkit.verification.engine_types import PLATFORMS, Selected
from qkit.verification.vllm_table import Choice
from qkit.workflows.engine_layers import place_of

_MODEL = "model"  # of the one in a question


def ask_result(
    out: Path,
    linears: Iterable[str],
    python: Path,
    progress: Progress,
    gpus: Sequence[str] = PLATFORMS,
    ranks: int = 1,
    timeout: float = TIMEOUT,
) -> Selected:
    """What vLLM selects for the linears of a packed folder, on each kind of GPU. Raises UsageError for an interpreter without
    vLLM, EngineRefusal where it gives no answer."""
    names = list(linears)
    by_gpu: dict[str, dict[str, tuple[str, Choice]]] = {}
    refused: dict[str, str] = {}
    versions = ""
    progress.start("asking vLLM", len(gpus))
    for gpu in gpus:
        answer = ask(python, gpu, {_MODEL: out}, tp=ranks, timeout=timeout)
        model, versions = answer.models[_MODEL], answer.version
        by_gpu[gpu] = dict(chosen_of(names, model))
        if model.refused:
            refused[gpu] = model.refused
        progress.step()
    return Selected(f"vLLM {versions}", by_gpu, refused)


def ask_plan(
    plan: Plan,
    structure: ModelStructure,
    python: Path,
    progress: Progress,
    gpus: Sequence[str] = PLATFORMS,
    timeout: float = TIMEOUT,
) -> Selected:
    """What vLLM would select for the result of a plan: only its config.json is made, in a folder that does not stay.

    Raises as ``ask_result``, and Unsupported for a result that is not for vLLM.
    """
    if plan.export == GGUF or structure.family.streams is not None:
        raise Unsupported("--engine vllm --python: vLLM has no choice of kernels for such a result: leave --python out")
    folder = Path(tempfile.mkdtemp(prefix="qkit-plan-"))
    try:
        config = {**structure.checkpoint.config, "quantization_config": quantization_config(plan, structure)}
        (folder / "config.json").write_text(json.dumps(config))
        for name in plan.side_files:
            if name != "config.json" and (structure.checkpoint.path / name).is_file():
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                os.symlink(structure.checkpoint.path.resolve() / name, target)
        return ask_result(folder, plan.packed, python, progress, gpus, plan.recipe["tp"], timeout)
    except EngineRefusal as e:
        raise type(e)(str(e).replace(str(folder), "the plan")) from e
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def chosen_of(names: Sequence[str], model: ModelChoice) -> Iterable[tuple[str, tuple[str, Choice]]]:
    """What vLLM chose for each linear of the file. One that it made no quantized layer of is not in its answer."""
    joined = {part: whole for whole, parts in model.joined.items() for part in parts}
    for name in names:
        place = place_of(name, model.layers, joined)
        if place is not None:
            found = model.layers[place]
            yield name, (place, Choice(found.scheme, found.kernel, found.refused))
