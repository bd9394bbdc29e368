"""The estimate of a run's time: pieces are timed with the plan's own solver, and add up by the forecast."""

import json

import pytest

from qkit.engine import duration
from qkit.engine.forecast import solving_operations
from qkit.planning.request import Request
from qkit.system import words
from qkit.system.parallel import workers
from qkit.workflows.quantize import prepare


def prepared(tiny, small, method, **options):
    rows = {"calib": small[1], "samples": 8, "seqlen": 32}
    request = Request(model=str(tiny("llama")), scheme="w4a16", method=method, options=options, **rows)
    return prepare(request)


@pytest.mark.parametrize("method", ["rtn", "gptq", "gptq+signround"])
def test_every_phase_of_a_forecast_has_a_rate(tiny, small, method):
    asked = prepared(tiny, small, method)
    with workers(1) as pool:
        rates = dict(duration._rates(asked.plan, pool))
    assert {phase for phase, n in asked.forecast.operations.items() if n} <= rates.keys() == duration.FACTORS.keys()
    assert all(rate > 0 for rate in rates.values())


def test_pieces_add_up(tiny, small, monkeypatch):
    asked = prepared(tiny, small, "gptq", sweeps=2)
    monkeypatch.setattr(duration, "_rates", lambda plan, pool: dict.fromkeys(duration.FACTORS, 1e3).items())
    work = sum(duration.FACTORS[phase] * n / 1e3 for phase, n in asked.forecast.operations.items())
    for threads in (1, 4):
        found = duration.seconds_by_phase(asked.plan, asked.forecast, threads)
        assert sum(found.values()) == pytest.approx(duration.START + work / threads)


def test_sweeps_are_counted_and_take_time(tiny, small):
    plain, swept = (prepared(tiny, small, "gptq", sweeps=n) for n in (0, 4))
    assert swept.forecast.operations["solving"] > plain.forecast.operations["solving"]
    planned = next(iter(swept.plan.linears.values()))
    assert solving_operations(planned, 2, 3) == (1 + 4 * 4) * 2 * 3 * 3 + 88 * 2 * 3


def test_the_plan_says_it(run, tiny, tmp_path):
    file = tmp_path / "plan.json"
    code, out, err = run("plan", "--model", tiny("llama"), "--scheme", "w4a16", "--method", "rtn", "--json", file)
    assert code == 0 and " on this machine" in out, err
    forecast = json.loads(file.read_text())["forecast"]
    assert forecast["seconds"] >= duration.START
    assert forecast["seconds"] == pytest.approx(sum(forecast["seconds_by_phase"].values()), abs=1)


def test_the_plan_says_what_the_next_level_would_take(run, tiny, small, tmp_path):
    file = tmp_path / "plan.json"
    code, out, err = run(
        "plan", "--model", tiny("llama"), "--scheme", "w4a16", "--quality", "fast", *small, "--json", file
    )
    assert code == 0 and "--quality balanced would take about " in out, err
    data = json.loads(file.read_text())
    assert data["quality"]["next"] == "balanced" and data["quality"]["next_seconds"] >= data["forecast"]["seconds"]


def test_a_profile_takes_its_passes_and_its_solver_runs(tiny, small, monkeypatch):
    asked = prepared(tiny, small, "gptq")
    probe = (asked.plan, asked.forecast)
    monkeypatch.setattr(duration, "_rates", lambda plan, pool: dict.fromkeys(duration.FACTORS, 1e3).items())
    monkeypatch.setattr(duration, "_rate", lambda operations, work: 1e3)
    none, passes, twice = (
        duration.profile_seconds(*a, 1) for a in (([probe], 0.0), ([probe], 1e6), ([probe] * 2, 0.0))
    )
    assert passes - none == pytest.approx(duration.PROFILE_PASSES * 1e3)
    packed = duration.FACTORS[duration.PACKING] * asked.forecast.operations[duration.PACKING] / 1e3
    run = duration.seconds_by_phase(*probe, 1)
    assert twice - none == pytest.approx(sum(run.values()) - duration.START - packed)


def test_a_time_in_words():
    assert [words.duration(x) for x in (8.2, 89, 90, 5399, 5400, 90_000)] == [
        "8 s", "89 s", "2 min", "90 min", "1.5 hours", "25 hours",
    ]  # fmt: skip
