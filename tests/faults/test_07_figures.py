"""Figures that are no numbers, results that are damaged or out of budget: never shown as if all were well."""

import json
import math
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import qkit
from qkit.commands.measured import unfinite
from qkit.errors import IOFailure
from qkit.files.rejected import NAME, RejectedWarning

WINDOWS = ["--window", 32, "--windows", 2]


@pytest.fixture(scope="module")
def packed(tmp_path_factory, tiny):
    from conftest import Quiet

    from qkit.workflows.quantize import Request, quantize

    out = tmp_path_factory.mktemp("packed") / "out"
    quantize(Request(model=str(tiny("llama")), scheme="w4a16", group_size=32), out, Quiet())
    return out


@pytest.fixture
def out(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "out")
    return tmp_path / "out"


def changed(folder, name, change):
    """One tensor of a folder with one file rewritten."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, {"format": "pt"})


def test_eval_of_a_model_that_computes_nan(run, tiny, calib, tmp_path):
    broken = shutil.copytree(tiny("llama"), tmp_path / "broken")
    changed(broken, "model.layers.0.mlp.down_proj.weight", lambda t: torch.full_like(t, math.nan))
    code, said, err = run("eval", broken, "--text", calib, *WINDOWS, "--json", tmp_path / "e.json")
    assert code == 4 and err.count("\n") == 1 and "not finite numbers, first texts.calib.perplexity" in err
    assert "nan" in said  # shown and written, and the exit code says that it proves nothing
    assert json.loads((tmp_path / "e.json").read_text())["texts"]["calib"]["perplexity"] is None


def test_eval_of_a_baseline_that_computes_nan(run, tiny, calib, tmp_path):
    broken = shutil.copytree(tiny("llama"), tmp_path / "broken")
    changed(broken, "model.norm.weight", lambda t: torch.full_like(t, math.inf))
    code, _, err = run("eval", tiny("llama"), "--baseline", broken, "--text", calib, *WINDOWS)
    assert (code == 4 and "baseline_perplexity" in err) or "kl.mean" in err


@pytest.mark.parametrize(
    ("measured", "bad"),
    [
        ({"texts": {"a": {"perplexity": 3.0, "ci": [math.nan, math.nan], "change_ci": [math.nan] * 2}}}, []),
        (
            {"texts": {"a": {"perplexity": 3.0, "kl": {"mean": math.inf, "ci": [0.0, math.inf], "p99": 1.0}}}},
            ["kl.mean"],
        ),
        ({"tasks": {"t": {"metrics": {"acc": {"value": math.nan, "ci": None}}}}}, ["acc.value"]),
        ({"videos": {"psnr": [math.inf, math.inf, math.inf], "ssim": [1.0, math.nan, math.nan]}}, []),
        ({"videos": {"latent_error": [math.nan, 0.0, 1.0]}}, ["latent_error"]),
        ({"caches": {"a": {"none": {"perplexity": math.nan}}}}, ["none.perplexity"]),
    ],
)
def test_what_counts_as_a_figure(measured, bad):
    found = unfinite(measured)
    assert len(found) == len(bad) and all(name.endswith(end) for name, end in zip(found, bad, strict=True))


def test_check_verifies_first(run, out, tiny, calib, tmp_path):
    (tmp_path / "b.yaml").write_text("perplexity: 1e300\nwindow: 32\nwindows: 2\n")
    common = ["--budget", tmp_path / "b.yaml", "--text", f"evaluation={calib}"]
    assert run("check", out, *common)[0] == 0
    changed(out, "model.layers.0.mlp.down_proj.weight_scale", lambda t: -t)
    code, said, err = run("check", out, *common)
    assert code == 4 and "model.safetensors" in err and "nothing was measured" in err
    assert err.count("\n") == 1 and "perplexity" not in said


def test_eval_verifies_first(run, out, calib, tmp_path):
    changed(out, "model.layers.0.mlp.down_proj.weight_scale", lambda t: -t)
    code, said, err = run("eval", out, "--text", calib, *WINDOWS, "--json", tmp_path / "e.json")
    assert code == 4 and "model.safetensors" in err and "nothing was measured" in err
    assert err.count("\n") == 1 and "perplexity" not in said and not (tmp_path / "e.json").exists()


def test_a_model_that_qkit_did_not_write_is_checked_as_it_is(run, tiny, calib, tmp_path):
    (tmp_path / "b.yaml").write_text("perplexity: 1\nwindow: 32\nwindows: 2\n")
    folder = shutil.copytree(tiny("llama"), tmp_path / "plain")
    before = sorted(p.name for p in folder.iterdir())
    code, _, err = run("check", folder, "--budget", tmp_path / "b.yaml", "--text", f"evaluation={calib}")
    assert code == 4 and "not met" in err
    assert sorted(p.name for p in folder.iterdir()) == before  # no mark in a folder that is not qkit's


def test_the_mark_of_a_rejected_result(run, out, calib, tmp_path):
    budget = tmp_path / "b.yaml"
    common = ["check", out, "--budget", budget, "--text", f"evaluation={calib}"]
    budget.write_text("perplexity: 1\nwindow: 32\nwindows: 2\n")
    code, _, err = run(*common)
    assert code == 4 and "1 of 1 limits" in err and NAME in err
    mark = json.loads((out / NAME).read_text())
    assert mark["budget"] == "b.yaml" and mark["failed"][0]["name"] == "perplexity.evaluation"
    code, said, err = run("inspect", out)
    assert (
        code == 0
        and "REJECTED: rejected by 'qkit check' with the budget b.yaml: not kept: perplexity.evaluation" in said
    )
    code, said, err = run("verify", out)
    assert code == 0 and "rejected" in said, err
    with pytest.warns(RejectedWarning, match=r"not kept: perplexity\.evaluation"):
        qkit.load(out)
    code, said, err = run("eval", out, "--text", calib, *WINDOWS)
    assert code == 0 and "rejected by 'qkit check'" in said and not err
    budget.write_text("perplexity: 1e300\nwindow: 32\nwindows: 2\n")
    assert run(*common)[0] == 0 and not (out / NAME).exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RejectedWarning)
        qkit.load(out)


@pytest.mark.parametrize("content", ["mine", '{"made_by": "me"}', "[1]", "{" * 5000])
def test_a_file_of_the_user_with_that_name_stays(content, run, out, calib, tmp_path):
    """It is no part of the result, so that the proof before the measurement names it."""
    (out / NAME).write_text(content)
    budget = tmp_path / "b.yaml"
    for limit in ("1", "1e300"):
        budget.write_text(f"perplexity: {limit}\nwindow: 32\nwindows: 2\n")
        code, _, err = run("check", out, "--budget", budget, "--text", f"evaluation={calib}")
        assert code == 4 and NAME in err
        assert (out / NAME).read_text() == content


def test_a_mark_that_cannot_be_written_does_not_hide_the_verdict(run, out, calib, tmp_path, monkeypatch):
    (tmp_path / "b.yaml").write_text("perplexity: 1\nwindow: 32\nwindows: 2\n")

    def full(path, data):
        raise IOFailure(f"cannot write {path}: no space")

    monkeypatch.setattr("qkit.files.rejected.write_atomic", full)
    code, _, err = run("check", out, "--budget", tmp_path / "b.yaml", "--text", f"evaluation={calib}")
    assert code == 4 and "1 of 1 limits" in err and "no space" in err
