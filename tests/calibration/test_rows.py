"""Which tokens of calibration rows count: not those of rows with values that are not finite, and not what rows were filled up
with; of texts, of image-text data, and of rows with shapes of their own."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from qkit.calibration.block_calls import Call
from qkit.calibration.block_runner import BlockRunner
from qkit.calibration.dataset import KINDS
from qkit.calibration.reading import Reading
from qkit.calibration.statistics import MAX_BAD_ROWS, Rows, StatsRequest
from qkit.errors import NumericFailure
from qkit.families.blocks import BlockStructure, Group, Linear, LinearGroup
from qkit.system.parallel import workers

COUNT, TOKENS, HIDDEN = 20, 8, 16
PADDING, TEXT, VISION, ANSWER = map(KINDS.index, ("padding", "text", "vision", "answer"))
ROW_KINDS = torch.tensor([VISION, VISION, VISION, TEXT, TEXT, ANSWER, PADDING, PADDING], dtype=torch.uint8)


class Toy(nn.Module):
    """A block: two linears, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 24, bias=False), nn.Linear(24, HIDDEN, bias=False)

    def forward(self, hidden):
        return hidden + self.down(torch.relu(self.up(hidden)))


def group(name: str, rows: int, columns: int) -> LinearGroup:
    linear = Linear(name=name, param=f"{name}.weight", shape=(rows, columns))
    return LinearGroup((linear,), Group((name,)), name)


STRUCTURE = BlockStructure(0, "toy", (group("up", 24, HIDDEN), group("down", HIDDEN, 24)), ())


@pytest.fixture
def made(tmp_path):
    """``made(hidden, **fields)``: rows in a file."""

    def go(hidden, **fields) -> Rows:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.rows"
        path.write_bytes(hidden.contiguous().numpy().tobytes())
        return Rows(
            path=path, count=len(hidden), tokens=TOKENS, hidden=HIDDEN, dtype=torch.float32, good=[True] * len(hidden), **fields
        )  # fmt: skip

    return go


def captured(rows: Rows, pool, name: str = "up", **more):
    """(statistics of the inputs of a linear, the rows as they are known then)."""
    torch.manual_seed(0)
    runner = BlockRunner(Toy().requires_grad_(False), STRUCTURE, rows, Call((), {}), pool)
    groups = tuple(g for g in STRUCTURE.groups if g.key == name)
    with torch.inference_mode():
        request = StatsRequest(hessian=True, ranges=True)
        stats = runner.capture(groups, request, lambda amount=1: None, keep=False, **more)
        return stats[name], runner.rows


def hidden_states() -> torch.Tensor:
    return torch.randn(COUNT, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))


def test_tokens_that_count():
    kinds = ROW_KINDS.expand(3, -1).clone()
    plain = Rows(path=None, count=3, tokens=TOKENS, hidden=1, dtype=torch.float32, good=[True, False, True])
    whole, none = [True] * TOKENS, [False] * TOKENS
    of_kinds = [k != PADDING for k in ROW_KINDS.tolist()]
    assert plain.valid(0, 3).tolist() == whole + none + whole
    assert plain.valid(0, 1) is None and plain.valid(1, 2).tolist() == none
    with_kinds = replace(plain, kinds=kinds)
    assert with_kinds.valid(0, 3).tolist() == of_kinds + none + of_kinds
    assert with_kinds.valid(1, 2).tolist() == none
    assert replace(with_kinds, kinds=kinds.clamp_min(1)).valid(2, 3) is None
    shaped = replace(plain, lead_shapes=((2, 3), (1, 4), (5,)))
    assert shaped.valid(0, 1) is None and shaped.valid(1, 2).tolist() == [False] * 4


@pytest.mark.parametrize("kinds", [None, ROW_KINDS], ids=["text", "image-text"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_does_not_count(kinds, value, made):
    """Statistics are those of the other rows, and the row stays out in all that follows."""
    hidden = hidden_states()
    kinds = None if kinds is None else kinds.expand(COUNT, -1).contiguous()
    wrong, others = hidden.clone(), [i for i in range(COUNT) if i != 5]
    wrong[5, 3, 2] = value
    with workers(1) as pool:
        expected, _ = captured(made(hidden[others], kinds=None if kinds is None else kinds[others]), pool)
        for good in ([True] * COUNT, [i != 5 for i in range(COUNT)]):  # found here, or known before
            found, rows = captured(replace(made(wrong, kinds=kinds), good=good), pool)
            assert found.tokens == expected.tokens == 19 * (8 if kinds is None else 6)
            assert [i for i, g in enumerate(rows.good) if not g] == [5]
            for name in ("hessian", "mean_square", "absmax", "mean_abs"):
                torch.testing.assert_close(getattr(found, name), getattr(expected, name))
            assert bool(found.sample.isfinite().all())
            if kinds is not None:
                counts = found.kinds.bincount(minlength=4).tolist()
                assert counts == [0, 19 * 2, 19 * 3, 19]


def test_what_rows_were_filled_up_with_does_not_count(made):
    kinds, hidden = ROW_KINDS.expand(COUNT, -1).contiguous(), hidden_states()
    filled = hidden.clone()
    filled[:, 6:] = 1e6
    with workers(1) as pool:
        (found, _), (expected, _) = (captured(made(x, kinds=kinds), pool) for x in (filled, hidden))
    assert torch.equal(found.absmax, expected.absmax) and torch.equal(found.hessian, expected.hessian)
    assert found.tokens == 6 * COUNT and PADDING not in found.kinds.tolist()


@pytest.mark.parametrize("kinds", [None, ROW_KINDS], ids=["text", "image-text"])
def test_one_row_in_ten_is_the_most_that_may_be_left_out(kinds, made):
    kinds = None if kinds is None else kinds.expand(COUNT, -1).contiguous()
    wrong = hidden_states()
    assert MAX_BAD_ROWS * COUNT == 2
    wrong[:2, 0, 0] = float("nan")
    with workers(1) as pool:
        assert captured(made(wrong, kinds=kinds), pool)[1].good.count(False) == 2
        wrong[2, 0, 0] = float("nan")
        with pytest.raises(NumericFailure, match="3 of 20 calibration samples have non-finite activations in toy"):
            captured(made(wrong, kinds=kinds), pool)


def test_a_row_that_was_left_out_stays_out(made, tmp_path):
    """Also where what it gives is finite again; and a row is left out from the block on where it turns non-finite."""
    hidden = hidden_states()
    rows = replace(made(hidden), good=[i != 5 for i in range(COUNT)])
    with workers(1) as pool, torch.inference_mode():
        runner = BlockRunner(Toy().requires_grad_(False), STRUCTURE, rows, Call((), {}), pool)
        left, _ = runner.leave(tmp_path / "left", lambda amount=1: None)
        assert [i for i, g in enumerate(left.good) if not g] == [5]
        assert bool(left.read(0, COUNT).isfinite().all())
        hidden[7, 1, 3] = float("inf")
        runner = BlockRunner(
            Toy().requires_grad_(False), STRUCTURE, replace(made(hidden), good=rows.good), Call((), {}), pool
        )
        left, _ = runner.leave(tmp_path / "left", lambda amount=1: None)
        assert [i for i, g in enumerate(left.good) if not g] == [5, 7]


def test_quantized_inputs_are_what_weights_are_multiplied_with(made, tmp_path):
    """The Hessian is of quantized inputs; the ranges and the drift are of the inputs before that."""
    hidden, original = hidden_states(), hidden_states() * 1.25
    (tmp_path / "up.original").write_bytes(original.numpy().tobytes())
    more = {"originals": {"up": tmp_path / "up.original"}, "readings": {"up": Reading(rounding=torch.round)}}
    with workers(1) as pool:
        stats, _ = captured(made(hidden), pool, **more)
    x, drift = hidden.view(-1, HIDDEN), (original - hidden).view(-1, HIDDEN)
    torch.testing.assert_close(stats.hessian, x.round().T @ x.round() / len(x))
    torch.testing.assert_close(stats.drift, drift.T @ x.round() / len(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.absmax, x.abs().amax(0))
    assert torch.equal(stats.sample, stats.sample.round())


def test_weighted_tokens(made, tmp_path):
    """In the Hessian, the drift and the sample each token has its weight, in ranges all are the same; a row that is left out
    takes its weights with it."""
    hidden, original = hidden_states(), hidden_states() * 1.25
    (tmp_path / "up.original").write_bytes(original.numpy().tobytes())
    weights = torch.rand(COUNT, TOKENS, generator=torch.Generator().manual_seed(2)) + 0.5
    good = [i != 3 for i in range(COUNT)]
    rows = replace(made(hidden), good=good)
    more = {"originals": {"up": tmp_path / "up.original"}, "readings": {"up": Reading(weights=weights)}}
    with workers(1) as pool:
        stats, _ = captured(rows, pool, **more)
        plain, _ = captured(rows, pool)
    x, w, drift = hidden[good].view(-1, HIDDEN), weights[good].view(-1, 1), (original - hidden)[good].view(-1, HIDDEN)
    torch.testing.assert_close(stats.hessian, (w * x).T @ x / len(x))
    torch.testing.assert_close(stats.drift, (w * drift).T @ x / len(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.sample, w.sqrt() * x)
    assert torch.equal(stats.absmax, plain.absmax) and torch.equal(plain.sample, x)


def test_products_of_the_drift_in_bf16(made, tmp_path):
    """They round as bf16 does, and nothing else changes."""
    hidden = hidden_states()
    (tmp_path / "up.original").write_bytes((hidden * 1.25 + 0.1).numpy().tobytes())
    originals = {"up": tmp_path / "up.original"}
    with workers(1) as pool:
        exact, _ = captured(made(hidden), pool, originals=originals)
        coarse, _ = captured(made(hidden), pool, originals=originals, readings={"up": Reading(drift=torch.bfloat16)})
    error = float((coarse.drift - exact.drift).norm() / exact.drift.norm())
    assert coarse.drift.dtype == torch.float32 and 0 < error < torch.finfo(torch.bfloat16).eps
    assert torch.equal(coarse.hessian, exact.hessian) and torch.equal(coarse.sample, exact.sample)


def test_stages_are_in_running_order(made):
    """Whatever order the groups are declared in: a layer that runs later must not be solved before what it reads is."""
    turned = replace(STRUCTURE, groups=STRUCTURE.groups[::-1])
    with workers(1) as pool, torch.inference_mode():
        runner = BlockRunner(Toy().requires_grad_(False), turned, made(hidden_states()), Call((), {}), pool)
    assert [g.key for stage in runner.stages for g in stage] == ["up", "down"]
