"""What ``--quality`` stands for: a method with its options for each kind of scheme. A help text names the levels, so this file
loads no library.

``balanced`` for narrow weights and for inputs in FP4 was measured on SmolLM2-135M-Instruct and tiny-llama, as packed files. The
rest follows what docs/choosing-a-method.md has of tiny-llama, and is our choice: reports/comparison/levels.py compares levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qkit.tensor.formats import Scheme

LEVELS = ("fast", "balanced", "best")
DEFAULT = "balanced"
SAMPLES = 128  # of a text, for which numbers of synthetic samples are meant


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a level asks for.

    method, options: as of a request; synthetic: number of samples that the model writes itself, beside SAMPLES of the text;
    why: half a sentence for people
    """

    method: str
    why: str
    options: Mapping[str, Any] = field(default_factory=dict)
    synthetic: int = 0

    def __str__(self) -> str:
        listed = ", ".join(f"{name}={str(value).lower()}" for name, value in self.options.items())
        written = f"{self.synthetic} synthetic samples" if self.synthetic else ""
        return " with ".join(x for x in (self.method, " and ".join(x for x in (listed, written) if x)) if x)


def kind_of_schemes(schemes: Sequence[Scheme]) -> str:
    """The kind of what is asked for, by which methods are chosen: 'gguf', 'fp4', 'int' or 'fp8' where any layer quantizes its
    inputs to that, 'narrow' for weights of up to four bits, 'wide' for more."""
    inputs = {s.activations.kind for s in schemes if s.activations is not None}
    if any(s.weights.gguf for s in schemes):
        return "gguf"
    if inputs:
        return next(kind for kind in ("fp4", "int", "fp8") if kind in inputs)
    return "narrow" if min(s.weights.bits for s in schemes) <= 4 else "wide"


def settings_of(kind: str, level: str) -> tuple[Setting, ...]:
    """What a level tries in turn for schemes of a kind."""
    return SETTINGS[kind][level]


_SIGNED = {"signed": True}
_SWEPT = {"sweeps": 4, "compensate": 0.5}
_GUIDED = {"guided": True}
_E2E = {"e2e_steps": 16}
_LEARNED = {"loss_weighted": True, **_E2E}
_SYNTHETIC, _FEW_SYNTHETIC = 80, 48  # learned rounding knows fewer samples by heart
_ROUNDS, _SOLVES = "rounding with a search of scales, which reads no data", "GPTQ with passes over codes and scales"
_GUIDES = "GPTQ with passes over codes and scales, and tokens weighted by their effect on the loss"
_GUIDES_E2E = f"{_GUIDES}, then scales are learned on the whole model"
_LEARNS = "rounding is learned on blocks"
_LEARNS_ALL = "rounding is learned on blocks, then scales on the whole model"
ROUNDING = Setting(method="rtn", why=_ROUNDS)
_SIGNED_ROUNDING = Setting(method="rtn", options=_SIGNED, why=_ROUNDS)
_GPTQ = Setting(method="gptq", options=_SWEPT, why=_SOLVES)
_SIGNED_GPTQ = Setting(method="gptq", options={**_SIGNED, **_SWEPT}, why=_SOLVES)
_GUIDED_GPTQ = Setting(method="gptq", options={**_SIGNED, **_SWEPT, **_GUIDED}, why=_GUIDES)
_E2E_GPTQ = Setting(
    method="gptq", options={**_SIGNED, **_SWEPT, **_GUIDED, **_E2E}, synthetic=_FEW_SYNTHETIC, why=_GUIDES_E2E
)
_GGUF_GPTQ = Setting(method="gptq", why=_SOLVES)
_GUIDED_GGUF = Setting(method="gptq", options=_GUIDED, why=_GUIDES)
_E2E_GGUF = Setting(method="gptq", options={**_GUIDED, **_E2E}, synthetic=_FEW_SYNTHETIC, why=_GUIDES_E2E)
_PIPELINE_GPTQ = Setting(method="gptq", options={**_SIGNED, "sweeps": 4}, why="GPTQ on samples of the pipeline")
_SMOOTHS = "outliers of inputs are moved into the weights, then GPTQ"
_SMOOTH = Setting(method="smoothquant+gptq", options={**_SIGNED, "sweeps": 4}, why=_SMOOTHS)
_GUIDED_SMOOTH = Setting(
    method="smoothquant+gptq",
    options={**_SIGNED, "sweeps": 4, **_GUIDED},
    why=f"{_SMOOTHS}, with tokens weighted by their effect on the loss",
)
# Behind smoothing, ``compensate`` makes NVFP4 worse: the damping is less for what has become alike.
_SMOOTH_FP4 = Setting(method="smoothquant+gptq", options={"sweeps": 4}, why=_SMOOTHS)
_LEARNED_NARROW = Setting(
    method="gptq+signround", options={**_SIGNED, **_SWEPT, **_GUIDED, **_LEARNED}, synthetic=_SYNTHETIC, why=_LEARNS_ALL
)
_LEARNED_NARROW_BLOCKS = Setting(method="gptq+signround", options={**_SIGNED, **_SWEPT}, why=_LEARNS)
_LEARNED_FP4 = Setting(method="smoothquant+gptq+signround", options={"sweeps": 4}, why=_LEARNS)
_LEARNED_GGUF = Setting(method="gptq+signround", options={**_GUIDED, **_LEARNED}, synthetic=_SYNTHETIC, why=_LEARNS_ALL)

KINDS = {
    "narrow": "weights of 2 to 4 bits, inputs in 16 bits",
    "wide": "weights of 5 bits or more, inputs in 16 bits",
    "int": "inputs in INT8",
    "fp8": "inputs in FP8",
    "fp4": "inputs in FP4",
    "gguf": "GGUF",
    "diffusion": "diffusion pipelines",
}
# By kind of scheme and level, what is tried in turn: the first that the model can have is used. Rounding is tried last.
SETTINGS: dict[str, dict[str, tuple[Setting, ...]]] = {
    "narrow": {
        "fast": (_SIGNED_ROUNDING,),
        "balanced": (_E2E_GPTQ, _GUIDED_GPTQ, _SIGNED_GPTQ),
        "best": (_LEARNED_NARROW, _LEARNED_NARROW_BLOCKS, _E2E_GPTQ, _GUIDED_GPTQ, _SIGNED_GPTQ),
    },
    "wide": {"fast": (ROUNDING,), "balanced": (_GPTQ,), "best": (_GPTQ,)},
    "int": {
        "fast": (_SIGNED_ROUNDING,),
        "balanced": (_GUIDED_SMOOTH, _SMOOTH, _SIGNED_GPTQ),
        "best": (_GUIDED_SMOOTH, _SMOOTH, _SIGNED_GPTQ),
    },
    "fp8": {"fast": (ROUNDING,), "balanced": (_GPTQ,), "best": (_GPTQ,)},
    "fp4": {
        "fast": (ROUNDING,),
        "balanced": (_SMOOTH_FP4, _GPTQ),
        "best": (_LEARNED_FP4, _SMOOTH_FP4, _GPTQ),
    },
    "gguf": {
        "fast": (ROUNDING,),
        "balanced": (_E2E_GGUF, _GUIDED_GGUF, _GGUF_GPTQ),
        "best": (_LEARNED_GGUF, _E2E_GGUF, _GUIDED_GGUF, _GGUF_GPTQ),
    },
    # Calibration samples the whole pipeline for every prompt.
    "diffusion": {"fast": (ROUNDING,), "balanced": (ROUNDING,), "best": (_PIPELINE_GPTQ,)},
}
