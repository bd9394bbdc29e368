"""Allocation against brute force, and its laws."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkit.allocation.knapsack import Choice, solve
from qkit.errors import NumericFailure, UsageError

numbers = st.floats(-1.0, 10.0, allow_nan=False, width=32)
unit = st.lists(st.tuples(numbers, st.integers(1, 10**9)), min_size=1, max_size=3)


def choices(units):
    return [[Choice(str(i), cost, {"bytes": size}) for i, (cost, size) in enumerate(u)] for u in units]


def brute(units, limit):
    best = None
    for picks in itertools.product(*[range(len(u)) for u in units]):
        if sum(u[i][1] for u, i in zip(units, picks, strict=True)) <= limit:
            cost = sum(u[i][0] for u, i in zip(units, picks, strict=True))
            best = cost if best is None else min(best, cost)
    return best


@settings(max_examples=120, deadline=None)
@given(st.lists(unit, min_size=1, max_size=8), st.floats(0.0, 1.0))
def test_it_equals_brute_force(units, where):
    low = sum(min(s for _, s in u) for u in units)
    high = sum(max(s for _, s in u) for u in units)
    limit = int(low + where * (high - low))
    found = solve(choices(units), {"bytes": limit})
    assert found.used["bytes"] <= limit
    assert found.cost == pytest.approx(brute(units, limit), abs=1e-5)
    assert found.gap <= 1e-5


@settings(max_examples=25, deadline=None)
@given(st.lists(unit, min_size=2, max_size=30))
def test_more_budget_never_costs_more(units):
    low = sum(min(s for _, s in u) for u in units)
    high = sum(max(s for _, s in u) for u in units)
    costs = [solve(choices(units), {"bytes": low + (high - low) * k // 6}).cost for k in range(7)]
    assert all(b <= a + 1e-5 for a, b in itertools.pairwise(costs))


def test_two_resources():
    """Bytes alone would take the first choice, time alone the second."""
    units = [[Choice("a", 0.0, {"bytes": 1, "ns": 9}), Choice("b", 1.0, {"bytes": 9, "ns": 1})] for _ in range(4)]
    assert solve(units, {"bytes": 36}).picks == (0, 0, 0, 0)
    found = solve(units, {"bytes": 20, "ns": 20})
    assert (found.cost, found.used) == (2.0, {"bytes": 20, "ns": 20})


def test_refused():
    units = choices([[(1.0, 10)], [(2.0, 20), (1.0, 40)]])
    with pytest.raises(UsageError, match="together is 30"):
        solve(units, {"bytes": 29})
    with pytest.raises(UsageError, match="without choices"):
        solve([[]], {"bytes": 29})
    with pytest.raises(NumericFailure, match="not finite"):
        solve(choices([[(float("nan"), 1)]]), {"bytes": 5})
