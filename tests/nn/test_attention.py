"""Attention by plain products: what the fused one gives, and only where it is to stand in for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as fused

from qkit.nn import attention
from qkit.nn.attention import FEW, LONGEST, PlainAttention, attend


def inputs(queries: int, keys: int, dtype: torch.dtype, shared: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(queries + keys)
    shapes = ((2, 4, queries, 16), (2, 4 // shared, keys, 16), (2, 4 // shared, keys, 16))
    query, key, value = (torch.randn(*s, generator=made).to(dtype).requires_grad_() for s in shapes)
    return query, key, value


def masks(queries: int, keys: int) -> dict[str, dict]:
    open_ = torch.rand(2, 1, queries, keys, generator=torch.Generator().manual_seed(0)) < 0.5
    open_[0, 0, 1] = False  # a query that sees nothing
    bias = torch.zeros(open_.shape).masked_fill(~open_, -torch.inf)
    return {"none": {}, "causal": {"is_causal": True}, "bool": {"attn_mask": open_}, "float": {"attn_mask": bias},
            "scaled": {"scale": 0.5}, "by head": {"attn_mask": torch.randn(1, 4, queries, keys)}}  # fmt: skip


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float", "scaled", "by head"])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)], ids=str)
def test_it_gives_what_the_fused_one_gives(mask: str, dtype: torch.dtype, near: float) -> None:
    """And so do its gradients. The reference computes in float64."""
    given = masks(6, 9)[mask]
    query, key, value = inputs(6, 9, dtype)
    wide = [x.detach().double().requires_grad_() for x in (query, key, value)]
    doubled = {k: v.double() if isinstance(v, Tensor) and v.dtype != torch.bool else v for k, v in given.items()}
    expected = fused(*wide, enable_gqa=True, **doubled)
    found = attend(query, key, value, enable_gqa=True, **given)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected.nan_to_num(), rtol=near, atol=near)
    slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    slope[0, :, 1] = 0.0  # torch's own gradient is not a number where a query sees nothing
    by = torch.autograd.grad(found, (query, key, value), slope.to(dtype))
    for a, b in zip(by, torch.autograd.grad(expected, wide, slope.to(dtype).double()), strict=True):
        assert bool(a.isfinite().all())
        torch.testing.assert_close(a.double(), b.nan_to_num(), rtol=near, atol=2 * near)


def test_where_it_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(attention, "attend", lambda *a, **k: taken.append(a[0].shape) or a[0])

    def asked(queries: int, keys: int, dtype: torch.dtype = torch.bfloat16, **options) -> bool:
        taken.clear()
        with PlainAttention():
            fused(*inputs(queries, keys, dtype, shared=1), **options)
        return bool(taken)

    assert asked(16, 16) and asked(16, LONGEST) and asked(FEW, 16, torch.float32)
    assert not asked(16, LONGEST + 1) and not asked(FEW + 1, 16, torch.float32) and not asked(16, 16, dropout_p=0.5)
    fused(*inputs(1, 16, torch.bfloat16, shared=1))
    assert len(taken) == 0  # outside of it nothing changes
