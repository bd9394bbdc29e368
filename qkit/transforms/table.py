"""The table of transforms, in the order in which they are applied: what each name of ``catalog.TRANSFORMS`` runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from qkit import catalog
from qkit.formats import Scheme
from qkit.transforms import BlockState
from qkit.transforms.balance import balanced_error
from qkit.transforms.residual import find_residual
from qkit.transforms.rotate import rotate_block
from qkit.transforms.scales import awq_candidates, smooth_block, smoothquant_candidates

Apply = Callable[[BlockState, dict[str, Scheme], int], None]


@dataclass(frozen=True)
class Transform(catalog.TransformInfo):
    """apply(state, schemes by linear name, seed)"""

    apply: Apply


_APPLY: dict[str, Apply] = {
    "rotate": lambda state, schemes, seed: rotate_block(state, seed),
    "hadamard": lambda state, schemes, seed: None,  # of every linear by itself, when it is solved (``inputs``)
    "smoothquant": lambda state, schemes, seed: smooth_block(state, schemes, smoothquant_candidates),
    "awq": lambda state, schemes, seed: smooth_block(state, schemes, awq_candidates),
    "mbq": lambda state, schemes, seed: smooth_block(state, schemes, awq_candidates, balanced_error),
    "mbq-mse": lambda state, schemes, seed: smooth_block(
        state, schemes, awq_candidates, partial(balanced_error, power=2)
    ),
    "residual": lambda state, schemes, seed: find_residual(state, schemes),
    "signround": lambda state, schemes, seed: None,  # of solved linears, in the loop (``reconstruct``)
}
TRANSFORMS: dict[str, Transform] = {
    name: Transform(**vars(info), apply=_APPLY[name]) for name, info in catalog.TRANSFORMS.items()
}
