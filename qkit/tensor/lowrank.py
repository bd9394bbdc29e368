"""The low-rank part of a quantized weight: two thin matrices in 16 bits, whose product compensates rounding errors.

weight = dequantized codes + sparse part + up @ down. The branch multiplies the same inputs as the codes: transformed ones, and
quantized ones where the scheme quantizes them.

A branch fits an error E = W - W~ where outputs see it. With H = X^T X of calibration inputs and L = chol(H + damping), the
rank-r matrix B of least |(E - B) L| is the truncated SVD of E L with L undone behind it, and what is left, squared, is the sum
of the squares of the dropped singular values (Eckart and Young). That is the whitening of SVD-LLM (arXiv 2403.07378), applied
to a quantization error as in LQER (arXiv 2402.02446) and QERA (arXiv 2410.06040). With the r left singular vectors U of E L,
B = U U^T E, so L is never inverted. SVDQuant (arXiv 2411.05007) runs such a branch beside low-bit products.

The singular vectors come from the smaller Gram matrix of E L in float64, a fifth of the work of a full SVD. Directions below
1e-8 of the largest singular value are lost in it: 16 bits would lose them too.

Bytes: 2 r (in + out). Operations: 2 r (in + out) a token, besides the 2 in out of the codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qkit.errors import BadCheckpoint
from qkit.tensor.sparse import value_dtype

PIECES = ("low_rank_down", "low_rank_up")
DAMP = 0.01  # of the mean diagonal of the Hessian, as in GPTQ
_COLUMNS = 1024  # of a Hessian that are in float64 at a time


@dataclass(frozen=True)
class LowRank:
    """down: [r, in]; up: [out, r]; both bf16 or fp16."""

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """The rank r."""
        return len(self.down)

    def to(self, device: torch.device) -> LowRank:
        """The matrices on another device."""
        return LowRank(self.down.to(device), self.up.to(device))


def specs(shape: tuple[int, int], rank: int, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """{suffix: (dtype, shape)} of the tensors on disk, for a weight [out, in] of a ``dtype`` model; nothing for rank 0."""
    if not rank:
        return {}
    stored_dtype = value_dtype(dtype)
    return dict(zip(PIECES, ((stored_dtype, (rank, shape[1])), (stored_dtype, (shape[0], rank))), strict=True))


def low_rank_bytes(shape: tuple[int, int], rank: int) -> int:
    """Bytes of a branch: 2 r (in + out)."""
    return 2 * rank * sum(shape)


def write(low_rank: LowRank) -> dict[str, Tensor]:
    """The tensors on disk, by suffix."""
    return dict(zip(PIECES, (low_rank.down, low_rank.up), strict=True))


def read(tensors: dict[str, Tensor], shape: tuple[int, int]) -> LowRank | None:
    """The inverse of ``write`` for a weight [out, in]; None where there is no branch. Raises BadCheckpoint for other shapes."""
    if PIECES[0] not in tensors:
        return None
    down, up = (tensors[p] for p in PIECES)
    if down.ndim != 2 or (*down.shape, *up.shape) != (len(down), shape[1], shape[0], len(down)):
        raise BadCheckpoint(
            f"a low-rank part of {list(down.shape)} and {list(up.shape)} does not fit a weight of {list(shape)}: export the "
            "checkpoint again"
        )
    return LowRank(down, up)


def add_(dense: Tensor, low_rank: LowRank) -> Tensor:
    """dense [out, in] float32, with the branch added in float32, in place."""
    return dense.addmm_(low_rank.up.to(dense.dtype), low_rank.down.to(dense.dtype))


def product(x: Tensor, low_rank: LowRank) -> Tensor:
    """float32 [..., out]: x [..., in] times the branch, summed in float32."""
    y: Tensor = x.float() @ low_rank.down.float().T @ low_rank.up.float().T
    return y


def find(
    error: Tensor, hessian: Tensor | None, rank: int, dtype: torch.dtype = torch.bfloat16, damp: float = DAMP
) -> LowRank:
    """The branch of the given rank that compensates most of an error, in the 16-bit type of a ``dtype`` model.

    error: float32 [out, in]; hessian: float32 [in, in] of the inputs; None, or one that is not finite: all inputs have equal
    weight (plain SVD). rank: at most min(out, in).
    """
    down, up = factors(error, hessian, rank, damp)
    stored_dtype = value_dtype(dtype)
    return LowRank(down.to(stored_dtype).contiguous(), up.to(stored_dtype).contiguous())


def factors(error: Tensor, hessian: Tensor | None, rank: int, damp: float = DAMP) -> tuple[Tensor, Tensor]:
    """(down, up) before they are rounded, float64.

    The r-th row of down and column of up have one norm, so that neither leaves the range of fp16, and the largest value of a
    column is positive.
    """
    e = error.to(torch.float64)
    if hessian is not None and not bool(hessian.isfinite().all()):
        hessian = None
    ridge = 1.0 if hessian is None else damp * float(hessian.diagonal().double().mean())
    if e.shape[0] <= e.shape[1]:
        u = _leading(_gram(e, hessian, ridge), rank)
    else:  # from the right singular vectors V of M = E L: the columns of M V are those of U, but for their lengths
        m = e if hessian is None else e @ _root(hessian, ridge)
        u = torch.linalg.qr(m @ _leading(m.T @ m, rank)).Q
    u = u * u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    down = u.T @ e
    size = down.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
    return down / size[:, None], u * size


def _gram(e: Tensor, hessian: Tensor | None, ridge: float) -> Tensor:
    """E (H + ridge) E^T, float64 [out, out]."""
    gram: Tensor = ridge * (e @ e.T)
    if hessian is not None:
        for columns, part in zip(hessian.split(_COLUMNS, 1), e.split(_COLUMNS, 1), strict=True):
            gram.addmm_(e @ columns.double(), part.T)
    return gram


def _root(hessian: Tensor, ridge: float) -> Tensor:
    """L with L L^T = H + ridge, float64 [in, in]; the identity where there is none."""
    damped = hessian.double()
    damped.diagonal().add_(ridge)
    lower, info = torch.linalg.cholesky_ex(damped)
    return torch.eye(len(damped), dtype=torch.float64, device=damped.device) if int(info) else lower


def _leading(gram: Tensor, rank: int) -> Tensor:
    """[n, r]: eigenvectors of the largest eigenvalues of gram [n, n], the largest first."""
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors[:, -rank:].flip(1)
