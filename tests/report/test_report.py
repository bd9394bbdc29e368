"""The Pareto curve against brute force; pictures and pages: sound, repeatable, and safe with any name."""

import itertools
import json
import struct
from dataclasses import replace
from html import escape
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkit.allocation.allocate import allocate
from qkit.allocation.pareto import cost_of, curve, mean_bits, measure_points, spread, uniform
from qkit.errors import UsageError
from qkit.report.allocation import allocation_files, allocation_html, next_larger
from qkit.report.figures import allocation_bars, heat_map, pareto_plot, png
from qkit.report.layout import Place, block_labels, places
from qkit.sensitivity.names import best_measure
from qkit.sensitivity.profile import CandidateCost, Profile, UnitProfile

SIGNATURE = b"\x89PNG\r\n\x1a\n"
REQUEST = {"method": "gptq", "group_sizes": {"A": 64, "B": None}, "samples": 8, "seqlen": 32, "rows": 4, "points": 2}


def unit(key: str, choices: dict[str, tuple[int, float]], *more: str) -> UnitProfile:
    """choices: {candidate: (bytes, cost)}; more: other linears of the unit."""
    return UnitProfile(
        key, (key, *more), 1000, {n: CandidateCost(size, {"kl": cost}) for n, (size, cost) in choices.items()}
    )


def profile(*units: UnitProfile) -> Profile:
    names = tuple(dict.fromkeys(n for u in units for n in u.choices))
    whole = {n: {"kl": 0.5, "loss": 0.4} for n in names if n != "keep"}
    return Profile(
        fingerprint="f" * 64,
        request=REQUEST,
        candidates=names,
        measures=("kl",),
        base_loss=2.5,
        fixed_bytes=4096,
        units=units,
        whole=whole,
    )


def blocks(count: int, kinds=("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")) -> Profile:
    """``count`` blocks; the last unit lacks a candidate, one cost is negative and what is kept costs nothing."""
    units = []
    for b in range(count):
        for i, kind in enumerate(kinds):
            cost = (1 + b) * (1 + i) / 100
            sizes = {"A": (250 + i, cost), "B": (500 + i, cost / 9), "keep": (2000, 0.0)}
            units.append(unit(f"model.layers.{b}.{kind}", sizes))
    last = units[-1].choices
    units[-1] = replace(units[-1], choices={n: c for n, c in last.items() if n != "B"})
    units[0] = replace(units[0], choices={**units[0].choices, "B": CandidateCost(500, {"kl": -0.001})})
    return profile(*units)


# ---- the curve -------------------------------------------------------------------------------------------------


def brute(made: Profile, limit: int) -> float:
    """The least cost within the limit, by trying everything."""
    options = [list(u.choices.values()) for u in made.units]
    fitting = (c for c in itertools.product(*options) if sum(x.bytes for x in c) <= limit)
    return min(sum(max(x.costs["kl"], 0.0) for x in c) for c in fitting)


sizes = st.tuples(st.integers(1, 5000), st.floats(-0.125, 10.0, allow_nan=False, width=32))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(sizes, min_size=1, max_size=3), min_size=1, max_size=5))
def test_the_curve_equals_brute_force(given_):
    made = profile(*(unit(f"m.{i}.x", {"ABC"[j]: c for j, c in enumerate(u)}) for i, u in enumerate(given_)))
    points = curve(made, "kl", 12)
    assert points
    for p in points:
        assert p.bytes == sum(u.choices[p.picks[u.key]].bytes for u in made.units) <= p.limit
        assert p.cost == pytest.approx(brute(made, p.bytes), abs=2e-5) == cost_of(made, p.picks, "kl")
        assert p.bits == pytest.approx(8 * p.bytes / (1000 * len(made.units)))
        solved = allocate(made, p.limit, "kl")
        assert (p.picks, p.bytes, p.cost, p.measured) == (solved.picks, solved.bytes, solved.cost, None)
    for a, b in itertools.pairwise(points):
        assert a.bytes < b.bytes and a.cost > b.cost
    least = sum(min(c.bytes for c in u.choices.values()) for u in made.units)
    most = sum(max(c.bytes for c in u.choices.values()) for u in made.units)
    assert points[0].bytes == least
    assert points[-1].cost == pytest.approx(brute(made, most), abs=2e-5)


def test_a_budget_that_buys_nothing_is_no_point():
    made = profile(unit("m.0.x", {"A": (100, 1.0), "B": (200, 1.0)}), unit("m.0.y", {"A": (100, 1.0), "B": (200, 0.5)}))
    assert [(p.bytes, p.cost) for p in curve(made, "kl", 9)] == [(200, 2.0), (300, 1.5)]


def test_measured_points_are_spread():
    points = curve(blocks(4), "kl", 20)
    seen, steps = [], []
    found = measure_points(points, 3, lambda picks: seen.append(picks) or 0.25, lambda: steps.append(1))
    measured = [i for i, p in enumerate(found) if p.measured is not None]
    assert measured == [0, round((len(points) - 1) / 2), len(points) - 1] and len(steps) == 3
    assert seen == [points[i].picks for i in measured] and [replace(p, measured=None) for p in found] == points
    assert spread(5, 1) == [2] and spread(5, 0) == [] and spread(3, 9) == [0, 1, 2] and spread(0, 1) == []


def test_one_format_everywhere():
    made = blocks(2)
    found = uniform(made, "kl")
    assert found.keys() == {"A", "keep"}  # one unit lacks B
    assert found["keep"] == (16.0, 0.0)
    assert found["A"][0] == pytest.approx(mean_bits(made, sum(u.choices["A"].bytes for u in made.units)))


def test_the_measure_of_the_curve():
    assert best_measure(("weight", "kl")) == "kl" and best_measure(("weight", "pqi")) == "pqi"
    assert best_measure(("loss", "fisher")) == best_measure(("fisher",)) == "fisher"
    with pytest.raises(UsageError, match="no measure"):
        best_measure(())


# ---- pictures --------------------------------------------------------------------------------------------------


def pictures(made: Profile) -> dict[str, bytes]:
    picks = allocate(made, sum(u.choices["keep"].bytes for u in made.units) // 4, "kl").picks
    points = curve(made, "kl", 8)
    some = [replace(p, measured=0.1) if i % 3 == 0 else p for i, p in enumerate(points)]
    return {
        "heat_map": png(heat_map(made, "kl")),
        "allocation": png(allocation_bars(made, picks)),
        "pareto": png(pareto_plot(some, (4.0, cost_of(made, picks, "kl")), uniform(made, "kl"))),
        "own axis": png(pareto_plot(some, None, {}, "weight")),
    }


@pytest.mark.parametrize("count", [1, 8, 32])
def test_pictures(count):
    """PNG files of a size to be read; the same twice."""
    made = blocks(count)
    first = pictures(made)
    for picture in first.values():
        assert picture.startswith(SIGNATURE) and picture.endswith(b"IEND\xaeB`\x82")
        width, height = struct.unpack(">II", picture[16:24])
        assert 400 < width < 3000 and 300 < height < 3000 and len(picture) > 5000
        assert b"Software" not in picture and b"tIME" not in picture
    if count == 8:
        assert pictures(made) == first


def test_the_heat_map_shows_every_cost():
    axes = heat_map(blocks(3), "kl").axes[0]
    cells = axes.get_images()[0].get_array()
    assert cells.shape == (3, 6)  # no column for what is kept
    assert cells.mask.sum() == 1 and bool(cells.mask[2, 5])  # what the last unit lacks
    assert cells[0, 1] < axes.get_images()[0].norm.vmin  # a negative cost, below the scale
    assert float(cells[2, 4]) == pytest.approx(0.09)
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0", "1", "2"]


def test_nothing_positive_can_be_drawn():
    made = profile(unit("m.0.x", {"A": (100, 0.0), "B": (200, -1.0)}))
    points = curve(made, "kl", 4)
    assert [p.bytes for p in points] == [100]
    for figure in (
        heat_map(made, "kl"),
        pareto_plot(points, (1.0, 0.0), uniform(made, "kl")),
        pareto_plot([], None, {}),
    ):
        assert png(figure).startswith(SIGNATURE)


def test_the_bars_hold_all_bytes_and_weights():
    made = blocks(5)
    picks = {u.key: "A" if i % 2 else "keep" for i, u in enumerate(made.units)}
    top, bottom = allocation_bars(made, picks).axes
    drawn = sum(bar.get_height() for bar in top.patches)
    assert 1000 * drawn == pytest.approx(sum(u.choices[picks[u.key]].bytes for u in made.units))
    assert sum(bar.get_height() for bar in bottom.patches) == pytest.approx(100 * 5)


def test_places():
    """Kinds: leaves, with parents where leaves repeat in a block; blocks of several lists keep the list's name."""
    x = {"A": (1, 1.0)}
    mlp, shared = "model.layers.3.mlp", "model.layers.3.shared_expert"
    made = profile(
        unit("model.layers.3.self_attn.q_proj", x, "model.layers.3.self_attn.k_proj"),
        unit(f"{mlp}.gate_proj", x, f"{mlp}.up_proj"),
        unit(f"{shared}.gate_proj", x, f"{shared}.up_proj"),
        unit(f"{mlp}.experts.0.w1", x, f"{mlp}.experts.0.w2", f"{mlp}.experts.1.w1", f"{mlp}.experts.1.w2"),
    )
    block = "model.layers.3"
    assert list(places(made).values()) == [
        Place(block, "q,k"),
        Place(block, "mlp.gate,up"),
        Place(block, "shared_expert.gate,up"),
        Place(block, "w1,w2"),
    ]
    assert block_labels(made) == {block: "3"}
    two = profile(unit("blocks.0.to_q", x), unit("single_blocks.0.to_q", x), unit("head", x), unit("head.<b>", x))
    assert block_labels(two) == {"blocks.0": "blocks.0", "single_blocks.0": "single_blocks.0", "": "-"}
    assert len(set(places(two).values())) == 4


# ---- the page --------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Texts, and what the page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.refers: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.refers += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "poster")]

    def handle_data(self, data):
        self.texts.append(data.strip())


def test_the_page():
    made = blocks(3)
    strange = ["model.layers.9.<b>bold</b>", "model.layers.9.\"><script>alert('x')</script>", "model.layers.9.a&amp;b"]
    made = replace(made, units=(*made.units, *(unit(k, {"A": (250, 0.1), "keep": (2000, 0.0)}) for k in strange)))
    found = allocate(made, 6000, "kl")
    text = allocation_html(made, found, curve(made, "kl", 6))
    page = Page(text)
    for u in made.units:
        assert u.key in page.texts and escape(u.key).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in text
    assert "b" not in page.tags and "script" not in page.tags and "<script" not in text
    assert len(page.refers) == 3 and all(r.startswith("data:image/png;base64,") for r in page.refers)
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    assert f"{found.bytes:,} of {found.limit:,}" in page.texts
    assert text.count('class="chosen"') == len(made.units)
    assert allocation_html(made, found, []).startswith("<!DOCTYPE html>")


def test_the_gain_of_the_next_larger_format():
    one = unit("m.0.x", {"C": (3000, 0.0), "A": (1000, 0.5), "B": (2000, 0.2)})
    assert next_larger(one, "A", "kl") == ("B", pytest.approx(0.3))
    assert next_larger(one, "C", "kl") is None


def test_the_files_agree_with_each_other():
    made = blocks(2)
    files = allocation_files(made, allocate(made, 4000, "kl"))
    assert files.keys() == {"heat_map.png", "allocation.png", "pareto.png", "allocation.html"}
    assert all(files[n].startswith(SIGNATURE) for n in files if n.endswith(".png"))


# ---- the command line ------------------------------------------------------------------------------------------


def test_commands(run, tiny, tmp_path, small):
    """Profile with the curve, measure points, run again without measuring anything twice, plan with pictures."""
    model, folder, figures = tiny("llama"), tmp_path / "profile", tmp_path / "deep" / "figures"
    arguments = ("--candidates", "int2,int4,int8,bf16", "--group-size", 32, "--rows", 4, "--measures", "weight,kl")
    command = ("profile", "--model", model, "--out", folder, *arguments, *small, "--pareto")
    code, out, err = run(*command, "--json", tmp_path / "printed.json")
    assert code == 0 and "Pareto curve" in out, err
    made = Profile.load(folder)
    alone = json.loads((folder / "pareto.json").read_text())
    assert alone == json.loads((tmp_path / "printed.json").read_text())["pareto"] and alone["measure"] == "kl"
    assert all(p["measured"] is None and p["picks"].keys() == {u.key for u in made.units} for p in alone["points"])
    assert not (folder / "plans.jsonl").exists()

    known = (folder / "measured.jsonl").read_bytes(), (folder / "profile.json").read_bytes()
    code, out, err = run(*command, "--pareto-measure", 2)
    assert code == 0 and "measured KL" in out, err
    assert ((folder / "measured.jsonl").read_bytes(), (folder / "profile.json").read_bytes()) == known
    measured = json.loads((folder / "pareto.json").read_text())["points"]
    assert [p["measured"] is None for p in measured] == [i not in (0, len(measured) - 1) for i in range(len(measured))]
    assert [{**p, "measured": None} for p in measured] == alone["points"]
    assert measured[0]["measured"] == pytest.approx(made.whole["W2A16"]["kl"], rel=1e-3)  # all at the smallest
    assert measured[-1]["measured"] == pytest.approx(0.0, abs=1e-6)  # all kept

    before = {n: (folder / n).read_bytes() for n in ("pareto.json", "pareto.png", "plans.jsonl")}
    assert run(*command, "--pareto-measure", 2)[0] == 0
    assert {n: (folder / n).read_bytes() for n in before} == before
    assert before["plans.jsonl"].count(b"\n") == 3  # the identity and two plans

    bare = ("plan", "--model", model, "--profile", folder, "--bits", 5, *small)
    plan = (*bare, "--figures", figures)
    code, out, err = run(*plan)
    assert code == 0 and "allocation.html" in out, err
    names = {"heat_map.png", "allocation.png", "pareto.png", "allocation.html"}
    assert {p.name for p in figures.iterdir()} == names
    page = Page((figures / "allocation.html").read_text())
    assert all(u.key in page.texts for u in made.units)
    first = {n: (figures / n).read_bytes() for n in names}
    assert run(*plan)[0] == 0
    assert {n: (figures / n).read_bytes() for n in names} == first
    (tmp_path / "file").write_text("")
    code, _, err = run(*bare, "--figures", tmp_path / "file" / "x")
    assert code == 5 and len(err.strip().splitlines()) == 1, err


def test_refused(run, tiny, tmp_path, small):
    code, _, err = run(
        "plan", "--model", tiny("llama"), "--scheme", "w4a16", "--figures", tmp_path / "f", "--group-size", 32, *small
    )
    assert code == 2 and "--figures goes with a budget" in err and not (tmp_path / "f").exists()
    command = ("profile", "--model", tiny("llama"), "--candidates", "int4", "--out", tmp_path / "p", *small)
    code, _, err = run(*command, "--rows", 4, "--pareto-measure", 2)
    assert code == 2 and "--pareto-measure needs --pareto" in err
    code, _, err = run(*command, "--rows", 4, "--pareto", "--measures", "")
    assert code == 2 and "no measure" in err and not (tmp_path / "p").exists()
