"""The post-quantization integral: each quantized weight's share of a loss change.

Hu et al., "Identifying Sensitive Weights via Post-quantization Integral", arXiv 2503.01901. For weights w and their
quantized values w~ the fundamental theorem of calculus gives, exactly,

  F(w~) - F(w) = int_0^1 grad F(w + t (w~ - w)) . (w~ - w) dt

and with N points on the path gbar . (w~ - w), gbar the mean gradient over the points: a sum over weights, so rows, linears
and blocks have their shares. The sensitivity of a weight is |gbar_j (w~_j - w_j)|.

The paper leaves the points open. Midpoints t_i = (i - 1/2) / N are our choice: their error falls with 1/N^2, that of one
end of each interval with 1/N. All points see the same rows, else the noise of sampling exceeds the error of the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qkit.calibration.batches import InputRows
from qkit.sensitivity.reference_model import ReferenceModel

RULES: dict[str, Callable[[int, int], float]] = {
    "midpoint": lambda i, n: (i + 0.5) / n,
    "right": lambda i, n: (i + 1) / n,
}


def mean_gradients(
    model: ReferenceModel,
    targets: Mapping[str, Tensor],
    rows: InputRows,
    points: int = 8,
    rule: str = "midpoint",
    step: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """The mean gradient of the loss on the path to ``targets``, gbar: {linear: float32 [out, in]}.

    targets: {linear: quantized weight, float32 [out, in]}; linears not named keep their weights
    rows:    that the loss is of, the same at every point
    step:    called after every point
    """
    start = {name: model.weight(name).clone() for name in targets}
    total = {name: torch.zeros_like(w) for name, w in start.items()}
    try:
        for i in range(points):
            t = RULES[rule](i, points)
            for name, target in targets.items():
                model.weight(name).copy_(torch.lerp(start[name], target, t))
            _, gradients = model.gradients(rows, list(targets))
            for name, gradient in gradients.items():
                total[name].add_(gradient, alpha=1 / points)
            step()
    finally:
        for name, weight in start.items():
            model.weight(name).copy_(weight)
    return total


def weight_shares(weight: Tensor, target: Tensor, gradient: Tensor) -> Tensor:
    """The contribution of each weight of a linear to the predicted loss change, gbar_j (w~_j - w_j), signed, in nats a
    token.

    weight, target, gradient: float32 [out, in], w, w~ and gbar; the result has their shape.
    """
    return (target - weight).mul_(gradient)
