"""From a profile and a budget to a packed mixed checkpoint, through the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

import qkit
from qkit.allocation.allocate import allocate, apply_bounds, limit_bytes
from qkit.allocation.limits import Budget
from qkit.allocation.refine import refine
from qkit.files.safefile import read_header
from qkit.sensitivity.profile import VERSION, Profile
from qkit.tensor import sparse
from qkit.workflows.budget_bytes import running_bytes
from qkit.workflows.quantize import open_structure

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import sweep_configs


def profiled(run, model, folder, small, candidates="int2,int4,int8,bf16", *more) -> Profile:
    measures = "weight,output,first,fisher,pqi,loss,kl"
    arguments = ("--candidates", candidates, "--group-size", 32, "--rows", 4, "--points", 2, "--measures", measures)
    code, out, err = run("profile", "--model", model, "--out", folder, *arguments, *small, *more)
    assert code == 0, err
    assert "loss change" in out and "\u2026" not in out
    return Profile.load(folder)


def test_from_profile_to_packed_file(run, tiny, tmp_path, small, monkeypatch):
    """Predicted bytes are the file's; a larger budget never costs more; the profile is read, not made again."""
    model, folder = tiny("llama"), tmp_path / "profile"
    monkeypatch.setenv("COLUMNS", "80")
    made = profiled(run, model, folder, small)
    assert {n for u in made.units for n in u.linears} == {
        n.removesuffix(".weight") for n in read_header(model / "model.safetensors") if "_proj." in n
    }
    assert all(u.choices["keep"].costs["kl"] == 0 for u in made.units)
    measured = (folder / "measured.jsonl").read_bytes()
    common = ("--model", model, "--method", "gptq", "--profile", folder, *small)
    costs = []
    for bits in (3, 4, 6, 9, 17):
        file = tmp_path / f"{bits}.json"
        code, out, err = run("plan", *common, "--bits", bits, "--explain", "--json", file)
        if bits == 17:  # everything may stay
            assert code == 2 and "every layer in full precision" in err
            continue
        assert code == 0 and "optimality gap" in out and "next: gain" in out, err
        # Into a pipe no cell is broken over lines.
        assert "(layers of model.layers)" in out and all(f" {k[13:]} " in out for k in (u.key for u in made.units))
        allocation = json.loads(file.read_text())["allocation"]
        assert allocation["bytes"] <= allocation["limit"] and allocation["gap"] < 1e-6
        costs.append(allocation["cost"])
    assert costs == sorted(costs, reverse=True)

    out = tmp_path / "out"
    code, said, err = run("quantize", *common, "--bits", 6, "--out", out)
    assert code == 0 and "allocation" in said, err
    assert (folder / "measured.jsonl").read_bytes() == measured
    packed = sum(i.nbytes for n, i in read_header(out / "model.safetensors").items() if "_proj." in n)
    report = json.loads((tmp_path / "6.json").read_text())["allocation"]
    assert packed == pytest.approx(report["bytes"], rel=0.005)
    formats = {layer["format"] for layer in report["layers"]}
    assert len(formats) > 1
    for layer in report["layers"]:  # fused layers agree
        assert len({Profile.load(folder).units[0].key}) == 1 and layer["format"] in made.candidates
    assert run("verify", out)[0] == 0
    found = tiny_models.logits(qkit.load(out, dtype=torch.float32), tiny_models.tokens())
    wanted = tiny_models.logits(qkit.load(model, dtype=torch.float32), tiny_models.tokens())
    assert 0 < tiny_models.relative(found, wanted) < 0.5


def test_a_stopped_profile_goes_on(run, tiny, tmp_path, small):
    model, folder = tiny("llama"), tmp_path / "profile"
    made = profiled(run, model, folder, small)
    lines = (folder / "measured.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "profile.json").unlink()
    (folder / "measured.jsonl").write_bytes(b"".join(lines[: len(lines) // 2]) + b'{"key": "torn')
    assert profiled(run, model, folder, small) == made
    assert sorted((folder / "measured.jsonl").read_bytes().splitlines(keepends=True)) == sorted(lines)


def test_refinement_measures_whole_plans(run, tiny, tmp_path, small):
    model, folder = tiny("llama"), tmp_path / "profile"
    profiled(run, model, folder, small)
    common = ("--model", model, "--method", "gptq", "--profile", folder, *small)
    said = {}
    for n in "ab":
        more = ("--refine", 8, "--json", tmp_path / f"{n}.json", "--out", tmp_path / n)
        code, said[n], err = run("quantize", *common, "--bits", 4, *more)
        assert code == 0 and "8 plans measured" in said[n], err
    one, two = (json.loads((tmp_path / f"{n}.json").read_text())["allocation"] for n in "ab")
    assert one == two
    start, end = (float(x) for x in said["a"].partition("KL divergence ")[2].split()[0:3:2])
    assert end <= start


def test_experts_are_one_decision(run, tiny, tmp_path, small):
    model, folder = tiny("mixtral"), tmp_path / "profile"
    made = profiled(run, model, folder, small, "int4,int8")
    experts = [u for u in made.units if "experts" in u.key]
    assert len(experts) == 2 and all(len(u.linears) >= 6 for u in experts)
    code, _, err = run(
        "quantize",
        "--model",
        model,
        "--profile",
        folder,
        "--bits",
        6.5,
        "--out",
        tmp_path / "out",
        "--method",
        "rtn",
        *small,
    )
    assert code == 0, err


def test_bounds_and_other_budgets(run, tiny, tmp_path, small):
    model, folder = tiny("llama"), tmp_path / "profile"
    made = profiled(run, model, folder, small)
    common = ("plan", "--model", model, "--profile", folder, *small, "--json", tmp_path / "plan.json")

    def picks(*arguments) -> dict[str, str]:
        code, _, err = run(*common, *arguments)
        assert code == 0, err
        return json.loads((tmp_path / "plan.json").read_text())["allocation"]["picks"]

    held = picks("--bits", 5, "--floor", "*.down_proj=int8", "--ceiling", "*.o_proj=int2")
    assert all(v in ("W8A16", "keep") for k, v in held.items() if "down_proj" in k)
    assert all(v == "W2A16" for k, v in held.items() if "o_proj" in k)
    # Swaps stay between the bounds too, even where every measurement calls for the opposite.
    bounds = [("*.down_proj", "W8A16")], [("*.o_proj", "W2A16")]
    for open_, obeys in ((made, False), (apply_bounds(made, *bounds), True)):
        limit = limit_bytes(made, Budget(bits=5), 0)
        starts = [allocate(open_, limit, "kl")]
        found = refine(open_, starts, lambda p: float(sum(v == "W2A16" for v in p.values())), 40).picks
        assert obeys == all(v in ("W8A16", "keep") for k, v in found.items() if "down_proj" in k)
        assert obeys == all(v == "W2A16" for k, v in found.items() if "o_proj" in k)
    bounds = ("--floor", "*.down_proj=int8", "--ceiling", "*.o_proj=int2")
    common = ("quantize", *common[1:], "--out", tmp_path / "out")
    assert all(v == "W2A16" for k, v in picks("--bits", 5, "--refine", 5, *bounds).items() if "o_proj" in k)
    common = ("plan", *common[1:-2])
    size = made.fixed_bytes + int(5 * sum(u.weights for u in made.units) / 8)
    running = sum(running_bytes(open_structure(str(model)), 100))
    assert picks("--memory", f"{size + running}B@100") == picks("--bits", 5)


def test_a_size_holds_for_the_files(run, tiny, tmp_path, small):
    model, folder, out = tiny("llama"), tmp_path / "profile", tmp_path / "out"
    made = profiled(run, model, folder, small)
    size = made.fixed_bytes + int(6 * sum(u.weights for u in made.units) / 8)
    common = ("--model", model, "--profile", folder, *small)
    code, _, err = run("quantize", *common, "--size", f"{size}B", "--out", out, "--json", tmp_path / "q.json")
    assert code == 0, err
    assert 0.7 * size < sum(f.stat().st_size for f in out.glob("*.safetensors")) <= size
    assert json.loads((tmp_path / "q.json").read_text())["allocation"]["bytes"] < size
    code, _, err = run("plan", *common, "--size", "20KB")
    assert code == 3 and "--size 0.02MB: the smallest formats of the profile need --size " in err
    needed = err.partition("need --size ")[2].partition("MB")[0]
    assert run("plan", *common, "--size", f"{needed}MB")[0] == 0


@pytest.mark.parametrize(("ends", "tables"), [((), 2), (("--embeddings", "int8", "--head", "int8"), 1.2)])
def test_a_size_counts_the_head_that_a_rotation_unties(run, tmp_path, small, ends, tables):
    """tables: the bytes of embeddings and head, of those of the one that the model has"""
    model, folder, out = sweep_configs.save("causal", "gemma", tmp_path / "model"), tmp_path / "made", tmp_path / "out"
    measured = ("--candidates", "int4,int8", "--measures", "weight", "--rows", 2, *small)
    code, _, err = run("profile", "--model", model, "--out", folder, *measured)
    assert code == 0, err
    made, table = Profile.load(folder), 4096 * 128 * 2
    size = made.fixed_bytes + int((tables - 1) * table) + int(5 * sum(u.weights for u in made.units) / 8)
    common = ("--model", model, "--profile", folder, *small, "--method", "rotate+rtn", "--measure", "weight", *ends)
    code, _, err = run("quantize", *common, "--size", f"{size}B", "--out", out)
    assert code == 0, err
    assert 0.7 * size < sum(f.stat().st_size for f in out.glob("*.safetensors")) <= size


def test_more_measures_join_a_profile(run, tiny, tmp_path, small):
    model, folder = tiny("llama"), tmp_path / "profile"
    common = ("--model", model, "--candidates", "int4,int8", "--method", "rtn", "--out", folder, "--rows", 2, *small)
    assert run("profile", *common, "--measures", "weight,kl")[0] == 0
    before = Profile.load(folder)
    assert run("profile", *common, "--measures", "output,weight")[0] == 0
    after = Profile.load(folder)
    assert after.measures == ("output", "weight", "kl")
    assert all(
        a.choices[c].costs[m] == b.choices[c].costs[m]
        for a, b in zip(after.units, before.units, strict=True)
        for c in a.choices
        for m in ("weight", "kl")
    )


@pytest.mark.parametrize("damage", ["text", "minus", "unit"])
def test_a_damaged_profile_is_refused(run, tiny, tmp_path, small, damage):
    model, folder = tiny("llama"), tmp_path / "profile"
    profiled(run, model, folder, small)
    data = json.loads((folder / "profile.json").read_text())
    choice = next(iter(data["units"][0]["choices"].values()))
    if damage == "text":
        choice["costs"]["weight"] = "much"
    elif damage == "minus":
        choice["bytes"] = -5
    else:
        del data["units"][0]
    (folder / "profile.json").write_text(json.dumps(data))
    code, _, err = run("plan", "--model", model, "--profile", folder, *small, "--bits", 5)
    assert code == 3 and ("damaged" in err or "another model" in err) and "Traceback" not in err


def test_options_that_do_not_fit_the_profile(run, tiny, tmp_path, small):
    model, folder = tiny("llama"), tmp_path / "profile"
    profiled(run, model, folder, small)
    common = ("plan", "--model", model, *small, "--bits", 5, "--profile")
    for options, said in (
        ((folder, "--candidates", "int4,int5"), "--candidates int4,int5: the profile"),
        ((folder, "--group-size", 8), "--group-size 8: the profile"),
        ((tmp_path / "none",), "no profile there"),
        (
            (folder, "--floor", "*=int4", "--ceiling", "*=int2"),
            "no format is left between its --floor and its --ceiling",
        ),
        ((folder, "--floor", "*=foo"), "--floor: unknown 'foo'"),
    ):
        code, _, err = run(*common, *options)
        assert code == 2 and said in err, err
    assert not (tmp_path / "none").exists()
    code, out, _ = run(*common, folder / "profile.json", "--method", "rtn" if made_with(folder) == "gptq" else "gptq")
    assert code == 0 and "the costs were measured with" in out
    flat = " ".join(out.split())
    assert f"costs: profile {folder}, measured with method" in flat and "forecast for method" in flat


def made_with(folder: Path) -> str:
    return Profile.load(folder).request["method"]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--bits", 3, "--size", "1MB"), 2, "exclude each other"),
        (("--bits", 0.5), 2, "--bits 0.5: expected"),
        (("--bits", 1.1), 3, "--bits 1.1: the smallest formats of the profile need --bits 2."),
        (("--size", "much"), 2, "--size much: expected a number"),
        (("--memory", "6GB"), 2, "6GB@32768"),
        (("--bits", 4, "--measure", "taste"), 2, "the profile has weight"),
        (("--bits", 4, "--floor", "*.none=int8"), 2, "matches no layer"),
        (("--bits", 4, "--floor", "down"), 2, "expected GLOB=FORMAT"),
        (("--bits", 4, "--scheme", "w4a16"), 2, "leave --scheme"),
        (("--scheme", "w4a16", "--refine", 3), 2, "goes with a budget"),
        (("--scheme", "w4a16", "--explain"), 2, "goes with a budget"),
    ],
)
def test_refused(options, code, said, run, tiny, tmp_path, small):
    folder = tmp_path / "profile"
    if "--refine" not in options and "--explain" not in options:
        profiled(run, tiny("llama"), folder, small)
        options = (*options, "--profile", folder)
    found, _, err = run("plan", "--model", tiny("llama"), *options, *small)
    assert found == code and said in err and len(err.strip().splitlines()) == 1, err


def test_profile_of_another_model(run, tiny, tmp_path, small):
    folder = tmp_path / "profile"
    profiled(run, tiny("llama"), folder, small)
    code, _, err = run("plan", "--model", tiny("qwen2"), "--profile", folder, "--bits", 5, *small)
    assert code == 3 and "the profile is of another model" in err
    (folder / "profile.json").write_text(json.dumps({"version": VERSION}))
    code, _, err = run("plan", "--model", tiny("llama"), "--profile", folder, "--bits", 5, *small)
    assert code == 3 and "damaged" in err


@pytest.mark.parametrize("bad", ["int4,int4", "int9x", ""])
def test_candidates_that_make_no_sense(bad, run, tiny, tmp_path, small):
    code, _, err = run(
        "profile", "--model", tiny("llama"), "--candidates", bad, "--out", tmp_path / "p", "--rows", 4, *small
    )
    assert code == 2 and "--candidates" in err


def test_more_bits_or_a_sparse_part(run, tiny, tmp_path, small):
    """The allocator chooses per layer; predicted bytes are the file's; what is loaded is what was predicted."""
    model, folder, out = tiny("llama"), tmp_path / "profile", tmp_path / "out"
    made = profiled(run, model, folder, small, "int2,int2+2%,int3,int3+1%")
    unit = made.units[0]
    more = unit.choices["W2A16+2%"].bytes - unit.choices["W2A16"].bytes
    assert more == sum(
        sparse.sparse_bytes(i.shape, round(0.02 * i.shape[0] * i.shape[1]), torch.bfloat16)
        for n, i in read_header(model / "model.safetensors").items()
        if n.removesuffix(".weight") in unit.linears
    )
    common = ("--model", model, "--profile", folder, "--measure", "weight", *small)
    code, said, err = run("quantize", *common, "--bits", 3.3, "--out", out, "--json", tmp_path / "plan.json")
    assert code == 0 and "%" in said, err
    packed = sum(i.nbytes for n, i in read_header(out / "model.safetensors").items() if "_proj." in n)
    code, _, err = run("plan", *common, "--bits", 3.3, "--explain", "--json", tmp_path / "plan.json")
    assert code == 0, err
    allocation = json.loads((tmp_path / "plan.json").read_text())["allocation"]
    assert packed == pytest.approx(allocation["bytes"], rel=0.005) and allocation["bytes"] <= allocation["limit"]
    assert any("+" in layer["format"] for layer in allocation["layers"])
    assert run("verify", out)[0] == 0
    code, _, err = run("quantize", *common, "--bits", 3.3, "--outliers", 1, "--out", tmp_path / "no")
    assert code == 2 and "leave --outliers" in err
    for wrong in ("int3+", "int3+x%", "int3+0%", "int3+50%"):
        arguments = ("--model", model, "--candidates", wrong, "--out", tmp_path / "none", *small)
        code, _, err = run("profile", *arguments)
        assert code == 2 and "percentage of outliers" in err


def test_a_profile_of_other_candidates_keeps_what_was_measured(run, tiny, tmp_path, small):
    """Other rows in the same folder are refused before anything is lost; other candidates and measures join."""
    model, folder = tiny("llama"), tmp_path / "profile"
    profiled(run, model, folder, small, "int4,int8")
    measured = (folder / "measured.jsonl").read_bytes()
    other = [*small[:2], "--samples", 6, *small[4:]]
    given = {"--candidates": "int4,int8", "--group-size": 32, "--rows": 4, "--points": 2, "--out": folder}
    arguments = tuple(x for pair in given.items() for x in pair)
    code, _, err = run("profile", "--model", model, *arguments, *other)
    assert code == 6 and "--samples: 8 there, 6 now" in err
    for option, value in (("--rows", 3), ("--points", 3), ("--group-size", 16)):
        changed = [x for pair in (given | {option: value}).items() for x in pair]
        code, _, err = run("profile", "--model", model, *changed, *small)
        assert code == 6 and f"another {option}" in err and f"{value} now" in err, err
    assert (folder / "measured.jsonl").read_bytes() == measured
    before = Profile.load(folder)
    more = ("--candidates", "int2,bf16", *arguments[2:], "--measures", "weight")
    assert run("profile", "--model", model, *more, *small)[0] == 0
    after = Profile.load(folder)
    assert set(after.candidates) == {*before.candidates, "W2A16", "keep"} and set(after.measures) == set(
        before.measures
    )
    for old, new in zip(before.units, after.units, strict=True):
        assert old.choices.items() <= new.choices.items()
    assert (folder / "measured.jsonl").read_bytes().startswith(measured)
    (folder / "profile.json").write_text("{")
    assert run("profile", "--model", model, *arguments, *small)[0] == 0  # made again from what was measured
    (folder / "measured.jsonl").write_bytes(b"{\n" + measured)
    code, _, err = run("profile", "--model", model, *arguments, *small)
    assert code == 3 and "delete this file" in err


def test_floats_integers_and_original_layers_in_one_file(run, tiny, tmp_path, small):
    """NVFP4, INT8 with INT8 activations and bf16 in one mixed-precision file, which stock transformers loads and agrees on."""
    model, folder, out = tiny("llama"), tmp_path / "profile", tmp_path / "out"
    profiled(run, model, folder, small, "nvfp4,w8a8,bf16")
    bounds = ("--floor", "*layers.0.mlp*=w8a8", "--ceiling", "*layers.1.mlp*=nvfp4")
    common = ("--model", model, "--profile", folder, *small)
    code, _, err = run("quantize", *common, "--bits", 9, *bounds, "--out", out)
    assert code == 0, err
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["format"] == "mixed-precision"
    formats = {g["format"] for g in config["config_groups"].values()}
    assert formats == {"nvfp4-pack-quantized", "int-quantized"}
    assert any("_proj" in name for name in config["ignore"])  # layers that stayed
    ids = tiny_models.tokens()
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps({"tokens": ids.tolist(), "loads": [[str(out), "bfloat16"]]}))
    script = Path(__file__).parents[1] / "stock_load.py"
    subprocess.run([sys.executable, str(script), str(jobs)], check=True, capture_output=True)
    assert json.loads(Path(f"{jobs}.out").read_text()) == {f"{out}|bfloat16": None}
    theirs = load_file(f"{out}.bfloat16.safetensors")["logits"]
    exact = tiny_models.logits(qkit.load(out, dtype=torch.float32), ids)
    ours = tiny_models.logits(qkit.load(out), ids)
    reference = tiny_models.logits(qkit.load(model, dtype=torch.float32), ids)
    # In bfloat16 both differ from exact arithmetic, by rounding that turns into other codes of activations.
    noise, found = float((ours - exact).norm()), float((theirs - exact).norm())
    assert found < 1.5 * noise and found < float((exact - reference).norm())
