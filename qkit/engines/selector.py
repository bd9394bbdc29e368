"""Asks vLLM's own code which scheme and kernel it selects for the layers of a file, on any GPU and with none at hand.

``vllm_selector_script.py`` runs in vLLM's interpreter. One process answers for one kind of GPU: vLLM looks at it while it is
imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkit.engines.process import ENGINES, TIMEOUT, run_script
from qkit.errors import UsageError
from qkit.tensor.formats import did_you_mean
from qkit.verification.engine_types import PLATFORMS

SCRIPT = "vllm_selector_script.py"


@dataclass(frozen=True)
class LayerChoice:
    """What vLLM chose for one of its layers: the classes of layer, scheme and kernel; or why it refuses it."""

    kind: str
    scheme: str
    kernel: str
    refused: str

    @staticmethod
    def of(data: Mapping[str, str]) -> LayerChoice:
        """The choice in an answer of the script."""
        return LayerChoice(*(str(data.get(key, "")) for key in ("class", "scheme", "kernel", "refused")))


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """What vLLM chose for a model. layers: by their names in vLLM; joined: the parts that it runs as one layer, by the last
    part of its name; refused: why it does not make the model at all."""

    layers: dict[str, LayerChoice]
    joined: dict[str, list[str]]
    refused: str


@dataclass(frozen=True, kw_only=True)
class SelectorAnswer:
    """Of one kind of GPU. models: by the names in the question; layers: in the order of the question; stand_ins: parts of
    vLLM's build for CUDA that were not there; architectures: the classes of models that vLLM has."""

    version: str
    gpu: str
    models: dict[str, ModelChoice]
    layers: list[LayerChoice]
    stand_ins: list[str]
    architectures: list[str]


def parse_gpus(text: str | None) -> tuple[str, ...]:
    """The kinds of GPU of --gpu: "sm90", "sm80,sm90", "cpu"; None: all. Raises UsageError."""
    if text is None:
        return PLATFORMS
    names = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",")))
    unknown = next((name for name in names if name not in PLATFORMS), None)
    if unknown is not None:
        raise UsageError(
            f"--gpu {text}: unknown '{unknown}': expected {', '.join(PLATFORMS)}"
            f"{did_you_mean(unknown, list(PLATFORMS))}"
        )
    return names


def ask(
    python: Path,
    gpu: str,
    models: Mapping[str, Path],
    *,
    layers: Sequence[Mapping[str, Any]] = (),
    base: Path | None = None,
    tp: int = 1,
    amx: bool = True,
    timeout: float = TIMEOUT,
) -> SelectorAnswer:
    """What vLLM in the interpreter ``python`` selects on one of PLATFORMS, with ``tp`` tensor-parallel ranks.

    models: folders with a config.json; weights are not looked at. layers: single layers, as the script describes them, in a
    model such as ``base``. amx: whether it may see AMX on this CPU. Raises as ``run_engine``.
    """
    job = {
        "gpu": gpu,
        "tp": tp,
        "amx": amx,
        "models": {name: str(folder.resolve()) for name, folder in models.items()},
        "layers": list(layers),
        "base": None if base is None else str(base.resolve()),
    }

    def complete(data: dict[str, Any]) -> SelectorAnswer | None:
        if not {"version", "models", "layers", "stand_ins", "architectures"} <= data.keys():
            return None
        return SelectorAnswer(
            version=data["version"],
            gpu=gpu,
            models={name: _model(found) for name, found in data["models"].items()},
            layers=[LayerChoice.of(found) for found in data["layers"]],
            stand_ins=list(data["stand_ins"]),
            architectures=list(data["architectures"]),
        )

    about = ", ".join(map(str, models.values())) or "single layers"
    return run_script(ENGINES["vllm"], SCRIPT, python, job, about, complete, timeout)


def _model(data: Mapping[str, Any]) -> ModelChoice:
    layers = {name: LayerChoice.of(found) for name, found in data["layers"].items()}
    return ModelChoice(layers=layers, joined=dict(data["joined"]), refused=str(data["refused"]))
