"""The table of transforms, in the order in which they are applied. It imports no torch, so that a command can be checked before
that is loaded.

A transform is a function ``(state, schemes by linear name, seed)`` that rewrites a block. To add one, write the function and
add a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qkit.system.option import E2E_STEPS, SIGNED, Option, Options, needs_of_options

if TYPE_CHECKING:
    from qkit.tensor.formats import Scheme
    from qkit.transforms.state import BlockState

# What a transform or a solver can need from calibration, in addition to inputs of quantized blocks.
NEEDS = {
    "hessian": "Hessian of the inputs of every group",
    "original_inputs": "inputs of every group in the original model, token by token",
    "original_statistics": "statistics of these inputs in the original model",
    "original_outputs": "outputs of the block in the original model",
    "modality_weights": "weight of errors at images relative to errors at answers, by a pass of the original model",
    "loss_weights": "effect of block errors on the loss, by a pass of the original model",
    "loss_gradients": "effect of every token's layer outputs on the loss, by a pass of the original model",
}
INPUTS = ("quantized", "original", "distort")
RATIOS = ("part", "linear")
SHARE = 0.25  # of the input channels that residual quantization doubles


@dataclass(frozen=True, kw_only=True)
class Transform:
    """An entry of the table.

    stage:        'load' (before rows run), 'stats' (after), 'inputs' (when each linear is solved) or 'block' (when all of
                  its linears are solved)
    needs:        what the transform needs from calibration, see NEEDS
    option_needs: (option, need) pairs: what it needs where an option does not have its default
    function:     imports the transform; None: it does not rewrite a block
    """

    stage: str
    summary: str
    options: Options
    needs: frozenset[str] = frozenset()
    option_needs: tuple[tuple[str, str], ...] = ()
    function: Callable[[], Any] | None = None

    def needs_with(self, options: dict[str, Any]) -> frozenset[str]:
        """The needs of the transform with these options."""
        return self.needs | needs_of_options(self.option_needs, self.options, options)

    def apply(self, state: BlockState, schemes: dict[str, Scheme], seed: int) -> None:
        """Rewrite the block. schemes: {linear name: scheme}."""
        if self.function is not None:
            self.function()(state, schemes, seed)


_BALANCE: Options = {
    "inputs": Option(
        default=INPUTS[0],
        summary="inputs of the search: quantized (after quantized blocks), original, or distort (both, as in the paper)",
        choices=INPUTS,
    ),
    "ratios": Option(
        default=RATIOS[0],
        summary="weight of errors at images: one ratio per part of a block, or per linear",
        choices=RATIOS,
    ),
}

TRANSFORMS: dict[str, Transform] = {
    "rotate": Transform(
        stage="load",
        summary="Hadamard rotation of the residual stream and the value heads, folded into the weights (arXiv 2404.00456)",
        options={},
        function=lambda: import_module("qkit.transforms.rotate").rotate,
    ),
    "hadamard": Transform(  # of every linear by itself, when it is solved (``input_transform``)
        stage="inputs",
        summary="block Hadamard transform of layer inputs at run time, for diffusion transformers (arXiv 2603.18742)",
        options={},
    ),
    "smoothquant": Transform(
        stage="stats",
        summary="shift of outliers from activations to weights, with a strength per group (arXiv 2211.10438)",
        options={},
        function=lambda: import_module("qkit.transforms.scales").smoothquant,
    ),
    "awq": Transform(
        stage="stats",
        summary="scaling of salient channels before rounding, with an exponent per group (arXiv 2306.00978)",
        options={},
        function=lambda: import_module("qkit.transforms.scales").awq,
    ),
    "mbq": Transform(
        stage="stats",
        summary="awq for vision-language models, with errors at images and answers balanced (arXiv 2412.19509)",
        options=_BALANCE,
        needs=frozenset({"modality_weights"}),
        option_needs=(("inputs", "original_statistics"),),
        function=lambda: import_module("qkit.transforms.balance").mbq,
    ),
    "mbq-mse": Transform(
        stage="stats",
        summary="mbq with squared errors",
        options=_BALANCE,
        needs=frozenset({"modality_weights"}),
        option_needs=(("inputs", "original_statistics"),),
        function=lambda: import_module("qkit.transforms.balance").mbq_mse,
    ),
    "residual": Transform(
        stage="stats",
        summary="second quantization of the input channels with the largest FP4 error, and the better of two NVFP4 scales "
        "(arXiv 2601.07475)",
        options={
            "share": Option(
                default=SHARE,
                summary="share of input channels that are quantized twice, 0 to 1; matrix products grow by the same share",
                above=0,
                most=1,
            )
        },
        function=lambda: import_module("qkit.transforms.residual").residual,
    ),
    "signround": Transform(  # of solved linears, in the loop (``rounding.block``)
        stage="block",
        summary="learned rounding of a block: codes and ranges, starting at those of the solver (arXiv 2309.05516)",
        options={
            "steps": Option(default=128, summary="learning steps per block", least=1),
            "batch": Option(default=4, summary="calibration samples per step", least=1),
            "rate": Option(
                default=0.0,
                summary="learning rate of the first step, in units of the grid; 0 for 1.5 / steps, at most 0.02",
                least=0,
            ),
            "loss_weighted": Option(
                default=False,
                summary="block errors weighted by their effect on the loss, which a pass of the original model measures",
                formerly="weigh",
            ),
            "e2e_steps": E2E_STEPS,
            "signed": Option(default=True, summary=SIGNED.summary),  # of the solver before it, whose default is no
        },
        needs=frozenset({"original_outputs"}),
        option_needs=(("loss_weighted", "loss_weights"),),
    ),
}
# By name: options of learned rounding. Time grows with the steps.
EFFORTS: dict[str, dict[str, Any]] = {"fast": {"steps": 32}, "default": {"steps": 128}, "best": {"steps": 512}}
