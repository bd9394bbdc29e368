"""Controls one run of a sampler: it decides which inputs are NVFP4 and which blocks are skipped, and keeps a log.

A controller observes the calls of a transformer and knows no pipeline. A ``Clock`` separates steps and guidance branches;
each branch has a state of its own (a batch that has both counts as one). A timestep that rises begins a new run; ``reset`` does
so explicitly.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from qkit.diffusion.clock import Clock
from qkit.diffusion.policy import BITS, NARROW, PURE, WARM_UP, WIDE, StepPolicy, mean_width
from qkit.errors import BadCheckpoint, Unsupported
from qkit.families.blocks import Streams
from qkit.families.structure import ModelStructure
from qkit.files.folder import RECORD, load_json
from qkit.tensor.formats import ACTIVATION_FORMATS, Format

SKIPPED, RAN = "skipped", "ran"  # of a whole block


class StepQuantizable(Protocol):
    """A packed linear whose input format is chosen at every call (``layers.QuantLinear``)."""

    weights: Format
    activations: Format | None
    chooser: Callable[[Tensor], Format | None] | None

    def product(self, x: Tensor, activations: Format | None) -> Tensor: ...


@dataclass(frozen=True)
class StepChoice:
    """A decision. choice: the input format of a linear (a key of ``policy.BITS``), or SKIPPED or RAN for a block
    (linear '').
    """

    step: int
    branch: int
    block: int
    linear: str
    choice: str


@dataclass(kw_only=True)
class _BlockHistory:
    """The history of one block and branch.

    last:    step of its last run; change: relative L1 of that run; deltas: {stream: residual, float32}
    drift:   relative change of the residual between its last two runs
    summed, skipped: summed drift and number of skips since the last run
    """

    last: int = -2
    change: float | None = None
    deltas: dict[str, Tensor] = field(default_factory=dict)
    drift: float | None = None
    summed: float = 0.0
    skipped: int = 0


class Controller:
    """Decides by a ``StepPolicy``. One controller serves one transformer in one thread."""

    watches = False  # keep residuals although no block is skipped

    def __init__(self, policy: StepPolicy) -> None:
        self.policy = policy
        self.reset()

    def reset(self) -> None:
        """Forget the run: the next call is the first step of a new one."""
        self.clock = Clock()
        self.states: dict[tuple[int, int], _BlockHistory] = {}
        self.log: list[StepChoice] = []

    # ---- where the run is --------------------------------------------------------------------------------------

    def enter(self, timestep: Any, latents: Tensor) -> None:
        """Count a call of the transformer, and begin a new run where its time is higher."""
        if self.clock.rises(timestep):
            self.reset()
        self.clock.tick(timestep, latents)

    @property
    def step(self) -> int:
        """Step of the run, from 0 on; -1 before it."""
        return self.clock.step

    @property
    def branch(self) -> int:
        """Guidance branch, from 0 on."""
        return self.clock.branch

    def state(self, block: int, inputs: dict[str, Tensor]) -> _BlockHistory:
        """The history of a block in this branch; a new one where shapes of inputs changed. inputs: by stream."""
        state = self.states.setdefault((self.branch, block), _BlockHistory())
        if any(n in inputs and inputs[n].shape != d.shape for n, d in state.deltas.items()):
            state = self.states[self.branch, block] = _BlockHistory()
        return state

    # ---- decisions ---------------------------------------------------------------------------------------------

    def skips(self, block: int, inputs: dict[str, Tensor]) -> bool:
        """Whether the block is skipped now, and its residual reused. Raises Unsupported for more steps than the policy has."""
        state, p = self.state(block, inputs), self.policy
        if p.computed:
            if self.step >= p.steps:
                raise Unsupported(
                    f"the policy decides about {p.steps} steps beforehand, and this run has more: sample with "
                    f"num_inference_steps={p.steps}, or quantize with --policy cache=delta"
                )
            return self.step not in p.computed and bool(state.deltas) and self._skip(block, state)
        if p.tau <= 0 or self.step < WARM_UP or state.drift is None:
            return False
        state.summed += state.drift
        return state.summed < p.tau and state.skipped < p.most and self._skip(block, state)

    def _skip(self, block: int, state: _BlockHistory) -> bool:
        state.skipped += 1
        self.log.append(StepChoice(self.step, self.branch, block, "", SKIPPED))
        return True

    def reused(self, block: int, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """{stream: residual, float32} of a skipped block."""
        gains = self.policy.gains.get(self.step, ())
        gain = gains[block] if block < len(gains) else 1.0
        return {n: d if gain == 1.0 else gain * d for n, d in self.state(block, inputs).deltas.items()}

    def ran(self, block: int, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        """Record a run of the block. inputs, outputs: by stream."""
        state = self.state(block, inputs)
        deltas = {n: y.float() - inputs[n].float() for n, y in outputs.items()}
        size = sum(float(d.abs().sum()) for d in deltas.values())
        state.change = size / max(sum(float(inputs[n].float().abs().sum()) for n in deltas), 1e-30)
        if state.deltas:
            last_size = sum(float(d.abs().sum()) for d in state.deltas.values())
            state.drift = sum(float((d - state.deltas[n]).abs().sum()) for n, d in deltas.items()) / max(
                last_size, 1e-30
            )
        if self.policy.caches or self.watches:
            state.deltas = deltas
        state.last, state.summed, state.skipped = self.step, 0.0, 0
        self.log.append(StepChoice(self.step, self.branch, block, "", RAN))

    def change(self, block: int) -> float | None:
        """Relative change that the block made one step earlier; None if it did not run then."""
        state = self.states[self.branch, block]
        return state.change if state.last == self.step - 1 else None

    def choose(self, block: int, linear: StepQuantizable, name: str, x: Tensor) -> str:
        """The format for inputs x [.., in] of a linear, a key of ``policy.BITS``."""
        p, change = self.policy, self.change(block)
        if p.caches and p.purify and float(x.abs().amax()) > p.purify * float(x.abs().mean()):
            return PURE
        if not p.caches and math.isinf(p.threshold):
            return NARROW if p.threshold > 0 else WIDE
        expected = p.predicted(name, change, block, self.clock.time)
        return NARROW if expected is not None and expected <= p.threshold else WIDE

    def decide(self, block: int, linear: StepQuantizable, name: str, x: Tensor) -> Format | None:
        """The chosen format, recorded in the log; None for inputs that are not quantized."""
        choice = self.choose(block, linear, name, x)
        self.log.append(StepChoice(self.step, self.branch, block, name, choice))
        return ACTIVATION_FORMATS.get(choice)

    # ---- results ---------------------------------------------------------------------------------------------

    @property
    def width(self) -> float:
        """Mean bits of the inputs of all linears that were computed since the run began."""
        return mean_width([BITS[c.choice] for c in self.log if c.linear])

    @property
    def skipped(self) -> float:
        """Share of the blocks' runs that were skipped."""
        blocks = [c.choice == SKIPPED for c in self.log if not c.linear]
        return sum(blocks) / max(1, len(blocks))


class RuleController(Controller):
    """A controller that uses the input format ``rule(step, block, linear)``, a key of ``policy.BITS``, and skips no block."""

    def __init__(self) -> None:
        self.rule: Callable[[int, int, str], str] = lambda step, block, linear: PURE
        super().__init__(StepPolicy(fits={}, threshold=-math.inf))

    def choose(self, block: int, linear: StepQuantizable, name: str, x: Tensor) -> str:
        """The format by the rule."""
        return self.rule(self.step, block, name)


class ControlledBlock(nn.Module):
    """A block that a controller may skip."""

    def __init__(self, block: nn.Module, controller: Controller, index: int, streams: Streams) -> None:
        super().__init__()
        self.block = block
        self.controller, self.index, self.streams = controller, index, streams
        self.signature = inspect.signature(block.forward)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(
                super().__getattr__("block"), name
            )  # pipelines and tools of diffusers read attributes of blocks

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs of the block, computed or reused."""
        bound = self.signature.bind(*args, **kwargs).arguments
        inputs = {name: bound[name] for name in self.streams.names}
        c, single = self.controller, len(self.streams.returns) == 1
        if c.skips(self.index, inputs):
            deltas = c.reused(self.index, inputs)
            outputs = [
                (inputs[n].float() + deltas[n]).to(inputs[n].dtype) if n in deltas else None
                for n in self.streams.returns
            ]
            return outputs[0] if single else tuple(outputs)
        out = self.block(*args, **kwargs)
        results = dict(zip(self.streams.returns, (out,) if single else out, strict=True))
        c.ran(self.index, inputs, {n: y for n, y in results.items() if y is not None})
        return out


def attach(model: Any, controller: Controller, blocks: Sequence[str], streams: Streams) -> Controller:
    """Attach the controller to a packed transformer: to its blocks, and to linears whose weights and inputs are NVFP4."""
    signature = inspect.signature(model.forward)

    def look(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = signature.bind(*args, **kwargs).arguments
        controller.enter(arguments["timestep"], arguments["hidden_states"])

    for index, path in enumerate(blocks):
        block = model.get_submodule(path)
        for name, module in block.named_modules():
            linear: Any = module if hasattr(module, "chooser") else None
            if linear is not None and linear.weights.name == "nvfp4" and linear.activations is not None:
                linear.chooser = _chooser(controller, index, linear, f"{path}.{name}")
        model.set_submodule(path, ControlledBlock(block, controller, index, streams))
    model.register_forward_pre_hook(look, with_kwargs=True)
    model.steps = controller
    return controller


def attach_recorded(model: Any, structure: ModelStructure) -> None:
    """Attach a controller to a transformer whose record has a policy. Raises BadCheckpoint for one that cannot be read."""
    file = structure.checkpoint.path / RECORD
    recorded = load_json(file, "record", 1 << 28).get("diffusion") if file.is_file() else None
    if recorded is None:
        return
    assert structure.family.streams is not None
    try:
        policy = StepPolicy.from_json(recorded)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise BadCheckpoint(f"{file}: the policy by step ('diffusion') cannot be read: {e}: export it again") from e
    attach(model, Controller(policy), [b.path for b in structure.blocks], structure.family.streams)


def _chooser(
    controller: Controller, index: int, module: StepQuantizable, name: str
) -> Callable[[Tensor], Format | None]:
    return lambda x: controller.decide(index, module, name, x)
