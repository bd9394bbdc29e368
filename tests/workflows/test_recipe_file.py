"""recipe.yaml of a result makes the same weights again, with nothing else on the command line but data of the user."""

import hashlib
import json
import re
import shutil

import pytest
from conftest import Quiet

from qkit.files.strictyaml import parse_yaml, to_yaml
from qkit.planning.recipe import AUTO, make_recipe
from qkit.planning.recipe_file import _explicit, load_run
from qkit.solvers.table import SOLVERS
from qkit.transforms.table import TRANSFORMS
from qkit.verification.verify import verify
from qkit.workflows.convert import convert

FEW = ("--samples", "6", "--seqlen", "16")
KINDS = {
    "gptq": ("--scheme", "w4a16", "--method", "gptq", "--group-size", "32", "--option", "sweeps=2", *FEW),
    "rounding alone": ("--scheme", "w4a16", "--group-size", "32", "--embeddings", "int8", "--seed", "5"),
    "inputs too": ("--scheme", "w8a8", "--method", "smoothquant+gptq", *FEW),
    "learned": ("--scheme", "w4a16", "--group-size", "32", "--method", "signround", "--effort", "fast", "--option",
                "steps=3", *FEW),
    "rows of its own": ("--scheme", "w4a16", "--group-size", "32", "--method", "gptq", "--samples", "0", "--seqlen", "12",
                        "--synthetic-samples", "4", "--seed", "2"),
    "gguf": ("--scheme", "q4_k", "--method", "gptq", *FEW),
    "search": ("--scheme", "w4a16", "--group-size", "32", "--method", "auto", *FEW),
    "rotated": ("--scheme", "w4a16", "--group-size", "32", "--method", "rotate+gptq", "--seed", "7", *FEW),
    "cache": ("--scheme", "w4a16", "--group-size", "32", "--kv", "fp8", *FEW),
    "keys": ("--scheme", "w4a16", "--group-size", "32", "--kv", "int4", "--kv-scale-keys", *FEW),
    "sparse": ("--scheme", "w4a16", "--group-size", "32", "--outliers", "0.5", "--rank", "2", *FEW),
}  # fmt: skip


def weights(out):
    """{file: sha256} of the weights of a result"""
    files = [*out.glob("*.safetensors"), *out.glob("*.gguf")]
    assert files
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def made(run, *words):
    code, said, err = run("quantize", *words)
    assert code == 0, err
    return said


def made_again(run, model, out, *words):
    """The result of the recipe of a result."""
    again = out.with_name("again")
    said = made(run, "--model", model, "--recipe", out / "recipe.yaml", *words, "--out", again)
    return again, said


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_the_recipe_makes_the_same_weights(options, run, tiny, tmp_path):
    model, out = tiny("llama"), tmp_path / "out"
    made(run, "--model", model, *options, "--out", out)
    again, said = made_again(run, model, out)
    assert weights(again) == weights(out) and "of the recipe" not in said
    assert (again / "recipe.yaml").read_bytes() == (out / "recipe.yaml").read_bytes()
    assert (
        str(tmp_path) not in (out / "recipe.yaml").read_text() and str(model) not in (out / "recipe.yaml").read_text()
    )
    listed = json.loads((out / "qkit.json").read_text())["files"]["recipe.yaml"]
    assert listed == hashlib.sha256((out / "recipe.yaml").read_bytes()).hexdigest() and verify(out).ok


def test_a_budget_is_made_again_without_its_profile(run, tiny, tmp_path):
    model, out = tiny("llama"), tmp_path / "out"
    candidates = ("--candidates", "int3,int4,int8", "--group-size", "32", "--embeddings", "int8")
    made(run, "--model", model, "--bits", "4.5", *candidates, *FEW, "--out", out)
    shutil.rmtree(tmp_path / "out.profile")
    again, _ = made_again(run, model, out)
    schemes = {x["scheme"] for x in json.loads((again / "qkit.json").read_text())["linears"].values()}
    assert len(schemes) > 1 and weights(again) == weights(out) and not (tmp_path / "again.profile").exists()


def test_data_of_the_user_has_to_be_named_and_other_data_is_told(run, tiny, tmp_path):
    model, out, own = tiny("llama"), tmp_path / "out", tmp_path / "secret" / "my text.txt"
    own.parent.mkdir()
    own.write_text(" ".join(f"word{i}" for i in range(2000)))
    made(run, "--model", model, *KINDS["gptq"], "--calib", own, "--out", out)
    recipe = (out / "recipe.yaml").read_text()
    digest = hashlib.sha256(own.read_bytes()).hexdigest()
    assert "secret" not in recipe and f"sha256: {digest}" in recipe and "--calib 'my text.txt'" in recipe
    code, _, err = run("quantize", "--model", model, "--recipe", out / "recipe.yaml", "--out", tmp_path / "again")
    assert code == 2 and f"my text.txt (sha256 {digest[:12]})" in err and "add --calib" in err
    moved = own.rename(tmp_path / "elsewhere.txt")
    again, said = made_again(run, model, out, "--calib", moved)
    assert weights(again) == weights(out) and "of the recipe" not in said
    other = tmp_path / "other.txt"
    other.write_text(" ".join(f"other{i}" for i in range(2000)))
    said = made(run, "--model", model, "--recipe", out / "recipe.yaml", "--calib", other, "--out", tmp_path / "other")
    assert "note: the calibration samples are not those of the recipe, which were of my text.txt" in " ".join(
        said.split()
    )
    assert weights(tmp_path / "other") != weights(out)
    code, _, _ = run("plan", "--model", model, "--recipe", out / "recipe.yaml", "--method", "rtn")
    assert code == 0


def test_several_sources_keep_their_columns_and_weights(run, tiny, tmp_path):
    model, out = tiny("llama"), tmp_path / "out"
    text, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text(" ".join(f"word{i}" for i in range(2000)))
    lines.write_text("".join(json.dumps({"said": f"line {i} says {i * i}", "n": i}) + "\n" for i in range(200)))
    sources = ("--calib", text, "--calib", f"{lines}:said:2")
    made(run, "--model", model, *KINDS["gptq"], *sources, "--out", out)
    head = (out / "recipe.yaml").read_text()
    assert "--calib a.txt --calib b.jsonl:said:2" in head
    again, said = made_again(run, model, out, *sources)
    assert weights(again) == weights(out) and "of the recipe" not in said


def test_the_command_line_goes_over_the_recipe(run, tiny, tmp_path):
    model, out = tiny("llama"), tmp_path / "out"
    made(run, "--model", model, *KINDS["gptq"], "--out", out)
    changes = ("--samples", "4", "--seed", "1", "--option", "damp=0.05", "--group-size", "16")
    again, said = made_again(run, model, out, *changes)
    record = json.loads((again / "qkit.json").read_text())
    assert record["recipe"]["options"]["damp"] == 0.05 and record["recipe"]["options"]["sweeps"] == 2
    assert (record["seed"], record["calibration"]["samples"], record["calibration"]["seqlen"]) == (1, 4, 16)
    assert record["recipe"]["group_size"] == 16 and "are not those of the recipe" in said


def test_what_differs_is_told(run, tiny, tmp_path):
    out, model = tmp_path / "out", tiny("llama")
    made(run, "--model", model, *KINDS["rounding alone"], "--out", out)
    recipe = out / "recipe.yaml"
    before = recipe.read_text()
    changed = re.sub(r"qkit: [\d.]+", "qkit: 0.0.7", re.sub("fingerprint: [0-9a-f]{4}", "fingerprint: abcd", before))
    assert changed != before
    recipe.write_text(changed)
    said = " ".join(run("plan", "--model", model, "--recipe", recipe)[1].split())
    assert "note: the recipe was made for another model" in said and "note: the recipe was made with qkit 0.0.7" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("calibration: {sampels: 3}", "calibration.sampels"),
        ("calibration: {samples: many}", "calibration.samples"),
        ("seed: [1]", "seed"),
        ("kv: {kind: nothing, widths: [4]}", "kv policy of kind"),
        ("kv: {kind: kivi, widths: [many]}", "widths.0 is"),
    ],
)
def test_a_wrong_entry_is_refused(text, said, run, tiny, tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(f"scheme: w4a16\n{text}\n")
    code, _, err = run("plan", "--model", tiny("llama"), "--recipe", file)
    assert code in (2, 3) and said in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8", "q4_k", "nvfp4"])
@pytest.mark.parametrize("transform", [None, *TRANSFORMS])
@pytest.mark.parametrize("solver", [*SOLVERS, AUTO])
def test_written_out_options_are_those_of_the_method(solver, transform, scheme):
    method = solver if transform is None else f"{transform}+{solver}"
    rules = [{"match": "*.q_proj", "scheme": "q6_k" if scheme == "q4_k" else "w8a16", "solver": "rtn"}]
    recipe = make_recipe({"scheme": scheme, "method": method, "rules": rules}, "test")
    filled = _explicit(recipe)
    again = make_recipe(parse_yaml(to_yaml(filled.model_dump(mode="json")).encode(), "recipe", "test"), "test")
    for rule, same in zip((None, *recipe.rules), (None, *again.rules), strict=True):
        assert again.resolve(same) == recipe.resolve(rule)
    assert solver == AUTO or filled.options == recipe.resolve(None)[2]
    assert _explicit(filled) == filled


def test_text_that_looks_like_a_number_stays_text():
    data = {
        "a": ["1e5", "12", "true", "~", "", ".inf", "no", "1:30", "x: y", "two\nlines", "-"],
        "b": {"c": 1e-05, "d": None},
    }
    same = [1, 2]
    data["twice"] = [same, same]
    assert parse_yaml(to_yaml(data).encode(), "recipe", "test") == data


def test_a_converted_result_keeps_the_recipe_of_its_weights(run, tiny, tmp_path):
    out = tmp_path / "out"
    made(run, "--model", tiny("llama"), *KINDS["rounding alone"][:4], "--out", out)
    convert(str(out), "gptq", tmp_path / "gptq", Quiet())
    assert (tmp_path / "gptq" / "recipe.yaml").read_bytes() == (out / "recipe.yaml").read_bytes()
    assert verify(tmp_path / "gptq").ok


def test_a_recipe_of_another_tool_is_not_taken_for_that_of_the_result(run, tiny, tmp_path):
    source = shutil.copytree(tiny("llama"), tmp_path / "source")
    (source / "recipe.yaml").write_text("default_stage:\n  modifiers: {}\n")
    made(run, "--model", source, *KINDS["rounding alone"], "--out", tmp_path / "out")
    assert load_run(tmp_path / "out" / "recipe.yaml").seed == 5
