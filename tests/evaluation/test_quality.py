"""The figures of quality against slow references in float64 and against answers known by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qkit.errors import BadInput, UsageError
from qkit.evaluation import metrics
from qkit.evaluation.metrics import (
    bootstrap_ci,
    compare_windows,
    cosine,
    nll_windows,
    perplexity,
    perplexity_change,
    ratio_ci,
    relative_error,
    split_windows,
    sqnr_db,
    wilson_ci,
)

VOCABULARY = 23


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(seed: int):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
        return LlamaForCausalLM(config).eval()

    return build


class Bigram(nn.Module):
    """Logits that depend on the present token only: a row of a table for each."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert use_cache is False
        return SimpleNamespace(logits=self.table[input_ids])


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def log_probabilities(model, window: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = model.double()(input_ids=window[None], use_cache=False).logits[0]
    return logits - logits.exp().sum(-1, keepdim=True).log()


@pytest.mark.parametrize("chunk", [1, 700, 1 << 20])
def test_likelihood_and_divergence_equal_a_reference_in_float64(llama, monkeypatch, chunk):
    monkeypatch.setattr(metrics, "CHUNK_BYTES", chunk)
    text = tokens(19 * 16 + 5)
    found = nll_windows(llama(0), text, 16)
    both = compare_windows(llama(0), llama(1), text, 16)
    assert found.shape == both.kl.shape == both.same_top1.shape == (19, 15)
    assert found.dtype == both.approx.dtype == both.kl.dtype == torch.float64
    p_model, q_model = llama(0), llama(1)
    for row in range(19):
        window = text[row * 16 : row * 16 + 16]
        p, q = log_probabilities(p_model, window)[:-1], log_probabilities(q_model, window)[:-1]
        want_p = torch.tensor([-p[i, window[i + 1]] for i in range(15)], dtype=torch.float64)
        want_q = torch.tensor([-q[i, window[i + 1]] for i in range(15)], dtype=torch.float64)
        torch.testing.assert_close(found[row], want_p, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(both.reference[row], want_p, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(both.approx[row], want_q, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(both.kl[row], (p.exp() * (p - q)).sum(-1), rtol=1e-5, atol=1e-6)
        assert torch.equal(both.same_top1[row], p.argmax(-1) == q.argmax(-1))
    assert 0.0 < both.same_top1.double().mean() < 1.0
    want = math.exp(float(torch.cat([found[row] for row in range(19)]).mean()))
    assert perplexity(found).mean == pytest.approx(want, rel=1e-12)


def test_a_model_does_not_differ_from_itself(llama):
    both = compare_windows(llama(3), llama(3), tokens(160), 32)
    assert torch.equal(both.kl, torch.zeros(5, 31, dtype=torch.float64))
    assert bool(both.same_top1.all())
    assert perplexity_change(both.reference, both.approx) == metrics.Interval(0.0, 0.0, 0.0)


def test_known_divergence():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    both = compare_windows(Bigram(p.log().repeat(3, 1)), Bigram(q.log().repeat(3, 1)), torch.tensor([0, 1, 2, 0]), 4)
    # 0.5 ln 2 - 0.25 ln 2
    torch.testing.assert_close(both.kl, torch.full((1, 3), 0.25 * math.log(2), dtype=torch.float64), rtol=1e-6, atol=0)
    want = torch.tensor([[math.log(4), math.log(4), math.log(2)]], dtype=torch.float64)
    torch.testing.assert_close(both.reference, want, rtol=1e-6, atol=0)
    assert not both.same_top1.any()


def test_tokens_that_the_reference_excludes_add_nothing_and_others_make_it_infinite():
    some = torch.tensor([[0.0, 0.0, -math.inf]]).repeat(3, 1)
    every = torch.zeros(3, 3)
    text = torch.tensor([0, 1, 0, 1])
    narrow = compare_windows(Bigram(some), Bigram(every), text, 4)
    torch.testing.assert_close(narrow.kl, torch.full((1, 3), math.log(1.5), dtype=torch.float64), rtol=1e-6, atol=0)
    assert torch.equal(compare_windows(Bigram(some), Bigram(some), text, 4).kl, torch.zeros(1, 3).double())
    assert bool(compare_windows(Bigram(every), Bigram(some), text, 4).kl.isposinf().all())


def test_nan_stays_nan_and_is_no_agreement():
    broken = torch.zeros(3, 3)
    broken[1, 1] = math.nan
    both = compare_windows(Bigram(broken), Bigram(broken), torch.tensor([0, 1, 0, 1]), 4)
    assert both.kl.isnan().tolist() == both.reference.isnan().tolist() == [[False, True, False]]
    assert both.same_top1.tolist() == [[True, False, True]]
    interval = perplexity(both.reference)
    assert all(math.isnan(value) for value in (interval.mean, interval.low, interval.high))


def test_half_precision_models_are_scored_in_fp32():
    table = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(0)).bfloat16().repeat(8, 1)[:VOCABULARY]
    text = tokens(64)
    assert torch.equal(nll_windows(Bigram(table), text, 16), nll_windows(Bigram(table.float()), text, 16))


def test_windows():
    text = torch.arange(23)
    assert split_windows(text, 5).tolist() == torch.arange(20).reshape(4, 5).tolist()
    assert split_windows(text, 5, 2).tolist() == torch.arange(10).reshape(2, 5).tolist()
    assert split_windows(text, 5, 9).shape == (4, 5)
    with pytest.raises(BadInput, match="23 tokens, and one window needs 24"):
        split_windows(text, 24)
    for window, limit in ((1, None), (5, 0)):
        with pytest.raises(UsageError, match="at least"):
            split_windows(text, window, limit)


def test_refused(llama):
    with pytest.raises(UsageError, match="windows of 65 tokens do not fit"):
        nll_windows(llama(0), tokens(200), 65)
    with pytest.raises(BadInput, match="token 7 and the model a vocabulary of 3"):
        nll_windows(Bigram(torch.zeros(8, 3)), torch.tensor([0, 7, 0, 1]), 4)
    with pytest.raises(UsageError, match="vocabulary of 3, the other one of 4"):
        compare_windows(Bigram(torch.zeros(3, 3)), Bigram(torch.zeros(3, 4)), torch.tensor([0, 1]), 2)
    with pytest.raises(BadInput, match="nothing to average"):
        bootstrap_ci(torch.empty(0))


def test_progress_counts_to_the_end():
    calls = []
    nll_windows(
        Bigram(torch.zeros(3, 3)), torch.zeros(20 * 4, dtype=torch.int64), 4, progress=lambda *at: calls.append(at)
    )
    assert calls == [(8, 20), (16, 20), (20, 20)]


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for _ in range(300):
        interval = bootstrap_ci(3.0 + torch.randn(60, generator=generator), resamples=1000)
        covered += interval.low <= 3.0 <= interval.high
    assert 0.90 <= covered / 300 <= 0.98


def test_the_interval_is_that_of_the_normal_approximation():
    values = torch.randn(400, generator=torch.Generator().manual_seed(2)).double()
    interval = bootstrap_ci(values)
    half = 1.96 * float(values.std()) / 20
    assert interval.mean == pytest.approx(float(values.mean()), abs=1e-12)
    assert interval.low == pytest.approx(interval.mean - half, abs=0.05 * half)
    assert interval.high == pytest.approx(interval.mean + half, abs=0.05 * half)
    assert bootstrap_ci(values) == interval
    assert bootstrap_ci(values, seed=1) != interval


def test_one_window_gives_no_interval():
    interval = perplexity(torch.full((1, 8), 2.0))
    assert interval.mean == pytest.approx(math.exp(2.0))
    assert math.isnan(interval.low) and math.isnan(interval.high)


def test_the_paired_interval_is_narrow_and_right():
    generator = torch.Generator().manual_seed(3)
    reference = 3.6 + 0.5 * torch.randn(200, 1, generator=generator).double().expand(200, 10)
    approx = reference + math.log(1.02) + 0.01 * torch.randn(200, 1, generator=generator).double()
    change, alone = perplexity_change(reference, approx), perplexity(approx)
    assert change.low < 0.02 < change.high
    assert change.high - change.low < 0.005
    assert (alone.high - alone.low) / alone.mean > 0.1
    assert perplexity(torch.full((3, 4), 1e6)).mean == math.inf


def test_errors_of_tensors():
    a = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    b = torch.tensor([[3.0, 4.0], [0.0, 0.5]])
    assert relative_error(a, b) == pytest.approx(0.1)
    assert sqnr_db(a, b) == pytest.approx(20.0)
    assert cosine(a, b) == pytest.approx(25.0 / (5.0 * math.sqrt(25.25)))
    assert (relative_error(a, a), sqnr_db(a, a)) == (0.0, math.inf)
    assert cosine(a, a) == pytest.approx(1.0, abs=1e-15)
    assert cosine(a, -a) == pytest.approx(-1.0, abs=1e-15)
    zero = torch.zeros(2, 2)
    assert (relative_error(zero, a), sqnr_db(zero, a), cosine(zero, a)) == (math.inf, -math.inf, 0.0)
    assert (relative_error(zero, zero), cosine(zero, zero)) == (0.0, 1.0)
    bad = torch.tensor([[math.nan, 0.0], [0.0, 0.0]])
    assert all(math.isnan(measure(a, bad)) for measure in (relative_error, sqnr_db, cosine))
    assert sqnr_db(a, torch.full((2, 2), math.inf)) == -math.inf
    with pytest.raises(UsageError, match="cannot compare shapes"):
        sqnr_db(a, torch.zeros(4))
    small = a.bfloat16()
    assert relative_error(small, (small + 1e-2).bfloat16()) > 0


def test_intervals_of_shares_and_ratios():
    """Wilson's interval against published figures; a ratio of sums weighs units by their tokens."""
    few = wilson_ci(torch.tensor([True] * 8 + [False] * 2))
    assert (few.mean, few.low, few.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    every = wilson_ci(torch.ones(10, dtype=torch.bool))
    assert (every.low, every.high) == pytest.approx((0.7225, 1.0), abs=1e-4)
    chance = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 9, (200,), generator=chance)
    values = [torch.randn(int(n), generator=chance, dtype=torch.float64) + 2 for n in counts]
    found = ratio_ci(torch.stack([v.sum() for v in values]), counts)
    assert found.mean == pytest.approx(float(torch.cat(values).mean()))
    spread = float(torch.cat(values).std()) / len(torch.cat(values)) ** 0.5  # tokens are independent here
    assert (found.high - found.low) / (2 * 1.96 * spread) == pytest.approx(1, abs=0.15)
    assert ratio_ci(torch.tensor([1.0, 2.0]), torch.tensor([1, 1])) == bootstrap_ci(torch.tensor([1.0, 2.0]))
    assert math.isnan(ratio_ci(torch.tensor([math.nan, 1.0]), torch.tensor([1, 2])).mean)
    infinite = ratio_ci(torch.tensor([math.inf, 1.0]), torch.tensor([1, 2]))
    assert infinite.mean == math.inf and math.isnan(infinite.low)
