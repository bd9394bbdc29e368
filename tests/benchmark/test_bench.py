"""qkit bench: what it measures is right, what cannot be is refused, and what it writes can be read."""

import json
from dataclasses import replace

import pytest
import torch

from qkit.benchmark.contenders import Contender, contenders, random_product
from qkit.benchmark.host import Host, cache_bytes, measure_host
from qkit.benchmark.products import Entrant, Timing, compare, make_entrants, product_record
from qkit.benchmark.shapes import MODELS, model_shapes, parse_shapes
from qkit.errors import Unsupported, UsageError
from qkit.sensitivity.candidates import parse_candidates

HOST = Host(copy=1e12, read=1e12, flops=1e15, cache=1 << 16, buffer=torch.ones(1 << 14))  # nothing is too fast for it
INT4 = parse_candidates("int4", 32)[0]


def test_gemv_end_to_end(run, tmp_path):
    code, out, err = run(
        *("bench", "gemv", "--shapes", "64x128", "--formats", "int4", "--group-size", 32, "--m", "1,3", "--threads", 1),
        *("--json", tmp_path / "b.json", "--figure", tmp_path / "b.png"),
    )
    assert code == 0 and "dense bf16" in out, err
    data = json.loads((tmp_path / "b.json").read_text())
    assert data["machine"]["processor"] and data["machine"]["versions"]["torch"] and data["bandwidth"]["read"] > 1e8
    (product,) = data["products"]
    assert (product["out"], product["in"], product["format"], product["group"]) == (64, 128, "W4A16", 32)
    assert {r["rows"] for r in product["results"]} == {1, 3}
    own = next(r for r in product["results"] if r["contender"] == "qkit")
    for when in ("cold", "warm"):
        assert 0 < own[when]["p20"] <= own[when]["p50"] <= own[when]["p80"]
    assert own["share"] == pytest.approx(own["floor"] / own["cold"]["p50"])
    assert 3 < own["speedup"]["dense bf16"]["ideal"] < 4 < own["speedup"]["dense float32"]["ideal"]
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("formats", ["int3", "nvfp4", "w8a8", "w4a8", "fp8", "mxfp4", "int4+1%", "bf16"])
def test_every_format_is_right(formats):
    """Everybody's product agrees with float64 at one row and at several."""
    (candidate,) = parse_candidates(formats, None)
    p = random_product(candidate, (64, 128), torch.bfloat16)
    entrants = make_entrants(p, "cpu", HOST)
    results = [r for rows in (1, 5) for r in compare(p, entrants, rows, HOST, 0.001)]
    assert [r.refused for r in results] == [None] * len(results)
    assert all(r.repeats and 0 <= r.error < 0.02 and r.cold and r.warm for r in results)
    assert {"qkit", "dense bf16", "dense float32"} <= {r.contender for r in results}
    ideal = product_record(p, results)["results"][0]["speedup"]["dense bf16"]["ideal"]
    assert ideal == pytest.approx(1.0) if formats == "bf16" else ideal > 1.4


def one(p, run, size=64 * 128):
    """The result of a contender with that function, which reads that many bytes."""
    entrant = Entrant(
        Contender(name="other", size=size, dtype=torch.bfloat16, prepare=lambda: None, run=run), [None], False
    )
    return compare(p, [entrant], 1, HOST, 0.001)[0]


def test_wrong_results_are_refused():
    """An output that was never written, one of another input, and zeros."""
    p = random_product(INT4, (64, 128), torch.bfloat16)
    right = p.exact.bfloat16()
    first = []

    def stale(_, x):
        first.append(x @ right.T)
        return first[0]

    wrong = (lambda _, x: torch.empty(1, 64), stale, lambda _, x: torch.zeros(1, 64))
    for run in (*wrong, lambda _, x: x @ right.T * 1.01):
        r = one(p, run)
        assert "wrong result" in r.refused and r.cold is None and r.share is None
    assert one(p, lambda _, x: x @ right.T).refused is None


def test_results_above_the_physical_limit_are_refused():
    p = random_product(INT4, (64, 128), torch.bfloat16)
    right = p.exact.bfloat16()
    assert one(p, lambda _, x: x @ right.T).refused is None
    r = one(p, lambda _, x: x @ right.T, size=10**15)
    assert "above the physical limit" in r.refused and "GB/s" in r.refused and r.cold is r.warm is None
    slow = replace(HOST, copy=1e3, read=500.0, flops=10.0)
    assert slow.refusal(1.0, 1050, 0) is None and "limit" in slow.refusal(1.0, 1100, 0)
    assert slow.refusal(1.0, 0, 640) is None and "operations" in slow.refusal(1.0, 0, 650)
    assert slow.refusal(0.0, 0, 0)
    assert slow.floor(500) == 0.5


def test_copies_fill_the_cache():
    """Three times the cache in distinct memory; where that would be too many, what is between is read instead."""
    p = random_product(INT4, (64, 128), torch.bfloat16)
    entrants = make_entrants(p, "cpu", HOST)
    for e in entrants:
        assert e.flush == (len(e.copies) * e.contender.size < 3 * HOST.cache)
    held = {c.operator_weight.data.data_ptr() for c in entrants[0].copies}
    assert len(held) == len(entrants[0].copies) > 1
    assert make_entrants(p, "cpu", replace(HOST, cache=1 << 30), names=("qkit",))[0].flush


def test_timing():
    assert Timing.of([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == Timing(2.0, 3.0, 5.0)
    assert Timing.of([1.0]) == Timing(1.0, 1.0, 1.0)


def test_the_host():
    host = measure_host(cache=1 << 16)
    assert host.copy > 1e8 and host.read > 1e8 and host.flops > 1e8 and host.bandwidth == max(host.copy, host.read)
    assert cache_bytes() >= 1 << 16


def test_shapes(tiny):
    assert parse_shapes("llama-3-8b, 64x128,64X128")[-1] == (64, 128)
    assert len(parse_shapes("llama-3-70b,llama-3-70b")) == len(MODELS["llama-3-70b"])
    assert model_shapes(str(tiny("llama"))) == ((64, 64), (32, 64), (96, 64), (64, 96))
    for bad in ("llama-3-7b", "64", "0x8", ""):
        with pytest.raises(UsageError, match="--shapes"):
            parse_shapes(bad)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("gemv",), 2, "use either --shapes or --model"),
        (("gemv", "--shapes", "8x8", "--model", "tiny-llama"), 2, "use either --shapes or --model"),
        (("gemv", "--shapes", "64x128", "--baseline", "tiny-llama"), 2, "--baseline cannot be used with 'bench gemv'"),
        (("decode", "--model", "tiny-llama", "--m", 1), 2, "--m cannot be used with 'bench decode'"),
        (("decode",), 2, "add --model"),
        (("decode", "--model", "tiny-llama", "--new-tokens", 10**6), 2, "positions"),
        (("gemv", "--shapes", "64x128", "--m", "1,0"), 2, "--m 1,0"),
        (("gemv", "--shapes", "64x128", "--formats", "int9"), 2, "--formats: unknown 'int9'"),
        (("gemv", "--shapes", "64x100", "--formats", "nvfp4"), 3, "not a multiple of the group size 16"),
        (("gemv", "--shapes", "64x128", "--device", "cuda"), 3, "this bench times the CPU alone"),
        (("decode", "--model", "tiny-llama", "--device", "cuda"), 3, "this bench times the CPU alone"),
        (("gemv", "--shapes", "64x128", "--m", "1,2", "--table", "t.json"), 2, "--table"),
    ],
    ids=lambda v: " ".join(map(str, v)) if isinstance(v, tuple) else None,
)
def test_refused(options, code, said, run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qkit.benchmark.host.measure_host", lambda: HOST)
    found, _, err = run("bench", *options)
    assert found == code and said in err and len(err.strip().splitlines()) == 1, err
    assert not list(tmp_path.iterdir())


def test_there_is_one_device():
    with pytest.raises(Unsupported, match="--device cuda"):
        contenders(random_product(INT4, (64, 128), torch.bfloat16), "cuda")


def test_decode_end_to_end(run, tiny, tmp_path, monkeypatch):
    """A packed model beside its original; models whose tokens differ from run to run are refused."""
    model, out = tiny("llama"), tmp_path / "out"
    code, _, err = run("quantize", "--model", model, "--scheme", "w4a16", "--method", "rtn", "--out", out)
    assert code == 0, err
    few = ("--prompt-tokens", 5, "--new-tokens", 4, "--json", tmp_path / "d.json")
    code, said, err = run("bench", "decode", "--model", out, "--baseline", model, *few)
    assert code == 0 and "tokens/s" in said, err
    models = json.loads((tmp_path / "d.json").read_text())["models"]
    assert [m["name"] for m in models] == [str(out), f"{model}, bf16", f"{model}, float32"]
    assert all(m["tokens_per_second"] == pytest.approx(1 / m["token"]["p50"]) for m in models)
    assert models[0]["size"] < models[1]["size"] == models[2]["size"] / 2

    from qkit.benchmark import decode

    count = iter(range(1000))
    monkeypatch.setattr(decode, "_round", lambda *_: decode.Round(1.0, 1.0, [next(count)]))
    code, said, err = run("bench", "decode", "--model", out, *few)
    assert code == 0 and "the same prompt gave different tokens" in said, err
    assert json.loads((tmp_path / "d.json").read_text())["models"][0]["tokens_per_second"] is None
