"""Budgets of time: tables, the plans under them, and what is said where something is missing."""

import itertools
import json
import random
from dataclasses import replace

import pytest

from qkit.allocation.allocate import allocate
from qkit.allocation.latency import Latency, LatencyTable, unit_times
from qkit.allocation.limits import parse_budget, parse_latency
from qkit.allocation.refine import refine
from qkit.errors import BadInput, Unsupported, UsageError
from qkit.sensitivity.candidates import parse_candidates
from qkit.sensitivity.profile import CandidateCost, Profile, UnitProfile
from qkit.sensitivity.units import unit_bytes, units_of
from qkit.workflows.quantize import open_structure

NAMES = ("W2A16", "W4A16", "W8A16", "keep")


def made_profile(structure, seed: int = 0) -> Profile:
    """Real units and bytes, random costs that fall with the bytes."""
    candidates = parse_candidates("int2,int4,int8,bf16", 32)
    numbers = random.Random(seed)
    units = []
    for unit in units_of(structure):
        sizes = {c.name: unit_bytes(unit, c, structure) for c in candidates}
        costs = sorted((numbers.random() for _ in candidates[1:]), reverse=True)
        choices = {
            n: CandidateCost(s, {"kl": cost, "weight": cost})
            for (n, s), cost in zip(sizes.items(), (*costs, 0.0), strict=True)
        }
        units.append(UnitProfile(unit.key, tuple(x.name for x in unit.linears), unit.weights, choices))
    request = {
        "method": "rtn",
        "group_sizes": {"W2A16": 32, "W4A16": 32, "W8A16": 32, "keep": None},
        "outliers": dict.fromkeys(NAMES, 0.0),
        "samples": 8,
        "seqlen": 32,
        "rows": 4,
        "points": 2,
        "dtype": "bfloat16",
    }
    fingerprint = structure.checkpoint.fingerprint()
    return Profile(
        fingerprint=fingerprint,
        request=request,
        candidates=NAMES,
        measures=("kl", "weight"),
        base_loss=3.0,
        fixed_bytes=1000,
        units=tuple(units),
        whole={},
    )


def made_table(structure, file, seed: int = 0) -> LatencyTable:
    """Times that have little to do with bytes: int2 is slow."""
    numbers = random.Random(seed)
    shapes = {x.shape for b in structure.blocks for x in b.linears}
    slow = {"W2A16": 3e-6, "W4A16": 1e-6, "W8A16": 2e-6, "keep": 4e-6}
    seconds = {
        (n, None if n == "keep" else 32, s): t * (1 + numbers.random()) for n, t in slow.items() for s in sorted(shapes)
    }
    table = LatencyTable(
        file=file, machine="a machine", device="cpu", dtype="bfloat16", rows=1, threads=2, seconds=seconds
    )
    table.save()
    return table


def brute(made: Profile, times: dict, most: int, limit: int | None) -> float:
    """The least cost within the limits, by trying everything."""
    best = float("inf")
    for names in itertools.product(NAMES, repeat=len(made.units)):
        pairs = list(zip(made.units, names, strict=True))
        size = sum(u.choices[n].bytes for u, n in pairs)
        if sum(times[u.key, n] for u, n in pairs) <= most and (limit is None or size <= limit):
            best = min(best, sum(u.choices[n].costs["kl"] for u, n in pairs))
    return best


@pytest.mark.parametrize("seed", range(3))
def test_it_equals_brute_force(seed, tiny, tmp_path):
    """Time alone, and time beside bytes."""
    structure = open_structure(str(tiny("llama", num_hidden_layers=1)))
    made = made_profile(structure, seed)
    times = unit_times(made, structure, made_table(structure, tmp_path / "t.json", seed), "M")
    least, most = (sum(f(times[u.key, n] for n in NAMES) for u in made.units) for f in (min, max))
    sizes = [sum(f(c.bytes for c in u.choices.values()) for u in made.units) for f in (min, max)]
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        latency = Latency(int(least + share * (most - least)), times)
        for limit in (None, (sizes[0] + 2 * sizes[1]) // 3):
            wanted = brute(made, times, latency.limit, limit)
            if wanted == float("inf"):
                with pytest.raises(Unsupported, match="within the budget of bytes"):
                    allocate(made, limit, "kl", latency=latency)
                continue
            found = allocate(made, limit, "kl", latency=latency)
            assert found.cost == pytest.approx(wanted, abs=1e-6)
            assert found.time == latency.of(found.picks) <= latency.limit == found.time_limit
            assert limit is None or found.bytes <= limit
    with pytest.raises(Unsupported, match="the fastest formats of the profile take"):
        allocate(made, None, "kl", latency=Latency(least - 1, times))


def test_refinement_stays_within_both(tiny, tmp_path):
    """Every plan that is measured fits the time and the bytes."""
    structure = open_structure(str(tiny("llama")))
    made = made_profile(structure)
    times = unit_times(made, structure, made_table(structure, tmp_path / "t.json"), "M")
    least = sum(min(times[u.key, n] for n in NAMES) for u in made.units)
    for limit in (None, sum(u.choices["W8A16"].bytes for u in made.units)):
        latency, seen = Latency(int(1.4 * least), times), []

        def measured(picks, latency=latency, limit=limit, seen=seen):
            size = sum(u.choices[picks[u.key]].bytes for u in made.units)
            assert latency.of(picks) <= latency.limit and (limit is None or size <= limit)
            seen.append(dict(picks))
            return random.Random(str(picks)).random()

        starts = [allocate(made, limit, m, latency=latency) for m in ("kl", "weight")]
        found = refine(made, starts, measured, 12, latency)
        assert found.picks in seen and len({tuple(p.values()) for p in seen}) == len(seen) == 12


def test_plan_and_quantize(run, tiny, tmp_path, small):
    """The time is predicted by the table, shown with where it comes from, and held; the explanation and figures work."""
    model, folder, file = tiny("llama"), tmp_path / "profile", tmp_path / "t.json"
    structure = open_structure(str(model))
    made = made_profile(structure)
    folder.mkdir()
    made.save(folder)
    table = made_table(structure, file)
    assert LatencyTable.load(file) == table
    common = ("--model", model, "--method", "rtn", "--profile", folder, *small)
    more = ("--explain", "--figures", tmp_path / "figures", "--json", tmp_path / "p.json")
    code, said, err = run("plan", *common, "--latency", f"25us@{file}", *more)
    assert code == 0 and "of 0.025 ms" in said and "a machine" in said and "2 threads" in said, err
    found = json.loads((tmp_path / "p.json").read_text())["allocation"]
    assert found["time"] <= found["time_limit"] == 25_000 and found["limit"] is None
    assert found["table"]["machine"] == "a machine"
    by_format = {tuple(layer["linears"]): layer["format"] for layer in found["layers"]}
    shapes = {x.name: x.shape for b in structure.blocks for x in b.linears}
    sums = [
        table.seconds[name, None if name == "keep" else 32, shapes[n]] for ns, name in by_format.items() for n in ns
    ]
    assert found["time"] == pytest.approx(1e9 * sum(sums), abs=len(sums))
    assert (tmp_path / "figures" / "allocation.html").is_file()
    code, said, err = run("plan", *common, "--latency", f"25us@{file}", "--bits", 9, "--json", tmp_path / "p.json")
    found = json.loads((tmp_path / "p.json").read_text())["allocation"]
    assert code == 0 and found["bytes"] <= found["limit"] and found["time"] <= 25_000, err
    out = tmp_path / "out"
    code, said, err = run("quantize", *common, "--latency", f"25us@{file}", "--out", out)
    assert code == 0 and "products of the layers" in said, err
    assert run("verify", out)[0] == 0


def test_a_measured_table_answers(run, tiny, tmp_path, small, monkeypatch):
    """What bench writes of a model, full precision or packed, is all that a plan asks for."""
    from test_bench import HOST

    monkeypatch.setattr("qkit.benchmark.host.measure_host", lambda: HOST)
    monkeypatch.setattr("qkit.commands.bench.SECONDS", 0.001)
    model, folder, file = tiny("llama"), tmp_path / "profile", tmp_path / "t.json"
    made = made_profile(open_structure(str(model)))
    folder.mkdir()
    made.save(folder)
    formats = ("--formats", "int2,int4,int8,bf16", "--group-size", 32, "--threads", 1)
    code, said, err = run("bench", "gemv", "--model", model, *formats, "--table", file)
    assert code == 0 and "16 times" in said, err
    common = ("--model", model, "--method", "rtn", "--profile", folder, *small)
    code, said, err = run("quantize", *common, "--latency", f"1s@{file}", "--bits", 6, "--out", tmp_path / "out")
    assert code == 0, err
    more = ("--formats", "int4", "--threads", 2, "--table", file)
    code, said, err = run("bench", "gemv", "--model", tmp_path / "out", *more)
    assert code == 2 and "another threads: 1 there" in err
    before = json.loads(file.read_text())["entries"]
    again = ("--formats", "int4", "--threads", 1, "--table", file)
    code, said, err = run("bench", "gemv", "--model", tmp_path / "out", *again)
    assert code == 0 and "20 times" in said, err  # those that were there and four more
    assert json.loads(file.read_text())["entries"][: len(before)] == before
    file.write_text("mine")
    code, _, err = run("bench", "gemv", "--model", tmp_path / "out", *again)
    assert code == 2 and "is no latency table" in err and file.read_text() == "mine"


@pytest.mark.parametrize(
    ("latency", "code", "said"),
    [
        ("12ms", 2, "12ms@table.json"),
        ("fast@t.json", 2, "expected a time"),
        ("0ms@t.json", 2, "expected a time"),
        ("1s@none.json", 3, "none.json: no such latency table"),
        ("1s@text.json", 3, "text.json"),
        ("1s@damaged.json", 3, "damaged latency table"),
        ("1s@older.json", 3, "not a latency table of this version"),
        ("1ns@t.json", 3, "--latency 0.000ms: the fastest formats of the profile take"),
        (
            "1s@short.json",
            3,
            "no time for format W8A16 in groups of 32 at 96x64: measure it with 'qkit bench gemv --model",
        ),
    ],
)
def test_refused(latency, code, said, run, tiny, tmp_path, small, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny("llama")
    structure = open_structure(str(model))
    (tmp_path / "profile").mkdir()
    made_profile(structure).save(tmp_path / "profile")
    table = made_table(structure, tmp_path / "t.json")
    data = json.loads((tmp_path / "t.json").read_text())
    short = [e for e in data["entries"] if (e["format"], e["out"]) != ("W8A16", 96)]
    (tmp_path / "short.json").write_text(json.dumps({**data, "entries": short}))
    (tmp_path / "damaged.json").write_text(json.dumps({**data, "entries": [{"format": "W4A16"}]}))
    (tmp_path / "older.json").write_text(json.dumps({**data, "version": 0}))
    (tmp_path / "text.json").write_text("not JSON")
    code_, _, err = run("plan", "--model", model, "--profile", "profile", "--latency", latency, *small)
    assert code_ == code and said in err and len(err.strip().splitlines()) == 1, err
    if "short" in latency:
        assert "--formats w2a16,w4a16,w8a16,bf16 --group-size 32 --table short.json" in err
    assert table.seconds


def test_experts_count_as_often_as_they_are_visited(tiny, tmp_path):
    structure = open_structure(str(tiny("mixtral")))  # two of four experts a token
    made = made_profile(structure)
    table = made_table(structure, tmp_path / "t.json")
    times = unit_times(made, structure, table, "M")
    shapes = {x.name: x.shape for b in structure.blocks for x in b.linears}
    for unit in made.units:
        whole = sum(table.seconds["W4A16", 32, shapes[n]] for n in unit.linears)
        share = 0.5 if len(unit.linears) > 4 else 1.0
        assert times[unit.key, "W4A16"] == pytest.approx(1e9 * whole * share, abs=1)


@pytest.mark.parametrize(
    "change", [{"machine": "another"}, {"device": "cuda"}, {"dtype": "float16"}, {"rows": 8}, {"threads": 1}], ids=str
)
def test_times_of_elsewhere_are_not_joined(change, tmp_path):
    """A table is joined with what its file has, unless that was measured elsewhere or otherwise: it stays as it is then."""
    one, two = ("W4A16", 32, (64, 64)), ("W8A16", 32, (64, 64))
    first = LatencyTable(
        file=tmp_path / "t.json",
        machine="a",
        device="cpu",
        dtype="bfloat16",
        rows=1,
        threads=2,
        seconds={one: 1.0, two: 2.0},
    )
    first.save()
    assert replace(first, seconds={one: 3.0}).merge().seconds == {one: 3.0, two: 2.0}
    before = first.file.read_bytes()
    with pytest.raises(UsageError, match="the file has times of another"):
        replace(first, **change).merge()
    assert first.file.read_bytes() == before


def test_parsing():
    assert parse_latency("1.5ms@a@b.json")[0] == 1_500_000
    assert str(parse_latency("2us@a@b.json")[1]) == "a@b.json"
    budget = parse_budget(None, "1MB", None, "2s@t.json")
    assert budget.size == 10**6 and budget.latency[0] == 2 * 10**9
    with pytest.raises(BadInput):
        LatencyTable.load(parse_latency("1s@/none")[1])
