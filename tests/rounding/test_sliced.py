"""Losses of logits in slices, against the same losses of whole logits in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qkit.rounding import sliced

VOCABULARY, WIDTH, TOKENS = 331, 24, 37


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several slices, and a last one that is shorter."""
    monkeypatch.setattr(sliced, "SLICE_LOGITS", 5 * VOCABULARY + 7)


@pytest.fixture
def head() -> nn.Module:
    """With what some models do to logits: a bias, and a bound."""
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, VOCABULARY, dtype=torch.float64).requires_grad_(False)
    return nn.Sequential(nn.LayerNorm(WIDTH, dtype=torch.float64), linear, nn.Tanh())


def hidden(seed: int) -> Tensor:
    return torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_divergence_and_its_gradient(head: nn.Module) -> None:
    ours, true = hidden(1).requires_grad_(), hidden(2)
    with torch.no_grad():
        expected = head(true).log_softmax(-1)
    plain = nn.functional.kl_div(head(ours).log_softmax(-1), expected, reduction="sum", log_target=True)
    (gradient,) = torch.autograd.grad(plain, ours)
    assert sliced.divergence(head, ours.detach(), true, VOCABULARY) == pytest.approx(plain.item(), rel=1e-12)
    found = sliced.divergence_gradient(head, ours.detach(), true, VOCABULARY)
    torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-14)
    assert sliced.divergence(head, true, true, VOCABULARY) == 0.0


def test_labels_are_drawn_from_the_model(head: nn.Module) -> None:
    """With the model's chances p and a label y, the gradient at the logits is p - onehot(y), on average zero."""
    x = hidden(3)
    drawn = [sliced.sampled_gradient(head, x, VOCABULARY, torch.Generator().manual_seed(seed)) for seed in range(200)]
    assert not torch.equal(drawn[0], drawn[1])
    again = sliced.sampled_gradient(head, x, VOCABULARY, torch.Generator().manual_seed(0))
    assert torch.equal(drawn[0], again)
    found = torch.stack(drawn)
    leaf = x.clone().requires_grad_()
    logits = head(leaf)
    chances = logits.detach().softmax(-1)
    away = found.mean(0) / (found.std(0) / len(found) ** 0.5)
    assert float(away.abs().mean()) == pytest.approx(0.8, abs=0.1)  # of a normal distribution
    labels = torch.randint(VOCABULARY, (TOKENS, 1), generator=torch.Generator().manual_seed(5))
    (plain,) = torch.autograd.grad(-logits.log_softmax(-1).gather(-1, labels).sum(), leaf, retain_graph=True)
    (ours,) = torch.autograd.grad(logits, leaf, chances.scatter_add(-1, labels, torch.full_like(labels, -1).double()))
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-14)


def test_no_slice_is_larger_than_it_may_be(head: nn.Module) -> None:
    seen: list[int] = []
    head.register_forward_hook(lambda _, args, out: seen.append(out.numel()))
    sliced.divergence_gradient(head, hidden(1), hidden(2), VOCABULARY)
    assert max(seen) <= sliced.SLICE_LOGITS < TOKENS * VOCABULARY
    monster = 10 * sliced.SLICE_LOGITS
    assert len(list(sliced.slices(3, monster))) == 3
