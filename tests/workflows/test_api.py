"""The functions of ``qkit`` do what the commands do, with the same options."""

import inspect
import json
import subprocess
import sys

import click
import pytest

import qkit
from qkit.commands.budget import budget_options
from qkit.commands.cache import cache_options
from qkit.commands.common import request_options
from qkit.commands.engine_options import engine_options
from qkit.errors import UsageError, VerifyFailure
from qkit.workflows.options import DEFAULTS

SMALL = {"samples": 4, "seqlen": 32, "group_size": 32, "threads": 1}


class Phases:
    """Notes the phases of a run."""

    def __init__(self):
        self.names, self.steps = [], 0

    def start(self, what, total):
        self.names.append(what)

    def step(self, amount=1):
        self.steps += amount


def test_the_same_bytes_as_the_command(tiny, calib, tmp_path, run):
    options = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
    common = ["--model", tiny("llama"), "--scheme", "w4a16", "--method", "gptq", "--calib", calib]
    assert run("quantize", *common, *options, "--option", "sweeps=1", "--out", tmp_path / "a")[0] == 0
    phases = Phases()
    report = qkit.quantize(
        tiny("llama"), scheme="w4a16", method="gptq", calib=calib, options={"sweeps": 1}, out=tmp_path / "b",
        progress=phases, **SMALL,
    )  # fmt: skip
    assert report.ok and phases.steps and any("block 1/" in name for name in phases.names)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)


def test_the_example_of_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    qkit.quantize("tiny-llama", scheme="w4a16", method="rtn", out="OUT")
    assert qkit.verify("OUT").ok
    assert qkit.load("OUT").config.model_type == "llama"
    assert capsys.readouterr().out == ""  # silent, unless asked


def test_plan_profile_and_a_budget(tiny, calib, tmp_path):
    known = {**SMALL, "calib": calib}
    found = qkit.plan(tiny("llama"), scheme="w4a16", method="rtn", **known)
    assert found.prepared is not None and found.prepared.forecast.packed_bytes > 0 and found.resolved.first == ()
    budget = {"bits": 5, "method": "rtn", "out": tmp_path / "out", "profile": tmp_path / "profile", **known}
    open_ = qkit.plan(tiny("llama"), **{**budget, "candidates": "int4,int8"})
    assert open_.prepared is None and open_.resolved.first  # a profile would be measured
    made = qkit.profile(
        tiny("llama"), out=tmp_path / "profile", candidates="int4,int8", measures=["kl"], method="rtn", rows=2, **known
    )
    assert set(made.whole) == {"W4A16", "W8A16"}
    assert qkit.plan(tiny("llama"), **budget).prepared is not None
    assert qkit.quantize(tiny("llama"), **budget).ok


def test_evaluate_and_check(tiny, calib, tmp_path):
    qkit.quantize(tiny("llama"), scheme="w8a16", method="rtn", out=tmp_path / "out", **SMALL)
    measured = qkit.evaluate(tmp_path / "out", baseline=tiny("llama"), texts=[calib], window=32, windows=2)
    assert measured["texts"]["calib"]["perplexity"] > 1
    (tmp_path / "b.yaml").write_text("perplexity: 1\nwindow: 32\nwindows: 2\n")
    checked = qkit.check(tmp_path / "out", budget=tmp_path / "b.yaml", texts=[f"evaluation={calib}"])
    assert (
        not checked.ok
        and checked.failed == ["perplexity.evaluation"]
        and (tmp_path / "out" / "qkit-rejected.json").is_file()
    )
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 1}))
    assert not qkit.verify(tmp_path / "out").ok
    for measure in (
        lambda: qkit.evaluate(tmp_path / "out", texts=[calib]),
        lambda: qkit.check(tmp_path / "out", budget=tmp_path / "b.yaml"),
    ):
        with pytest.raises(VerifyFailure, match="num_hidden_layers"):
            measure()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, o: qkit.quantize(m, schema="w4a16", out=o), "unknown option 'schema'"),
        (lambda m, o: qkit.quantize(m, out=o), "no scheme"),
        (lambda m, o: qkit.quantize(m, scheme="w4a16", out="/"), "no name of a folder"),
        (lambda m, o: qkit.quantize(m, scheme="w4a16", method="gptq", options={"sweeps": -1}, out=o), "sweeps"),
        (lambda m, o: qkit.plan(m, scheme="w4a16", kv_memory="2GB"), "--kv-memory"),
        (lambda m, o: qkit.profile(m, candidates="int4", out=o, bits=4), "unknown option 'bits'"),
    ],
)
def test_bad_options(call, words, tiny, tmp_path):
    with pytest.raises(UsageError, match=words):
        call(tiny("llama"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_options_are_those_of_the_command():
    """DEFAULTS has every option of quantize, and no other, with the same default."""

    @click.command()
    @request_options
    @budget_options
    @cache_options
    @engine_options
    def command(**values):
        """Nothing."""

    parsed = command.make_context("quantize", ["--model", "m"]).params
    assert {name: value for name, value in parsed.items() if name not in ("model", "json_file", "written")} == DEFAULTS
    assert {"scheme", "method", "calib", "out"} <= set(inspect.signature(qkit.quantize).parameters)


def test_old_module_names_go_on_working():
    assert qkit.generate.Decoder.__name__ == "Decoder" and callable(qkit.speculate.speculate)


def test_the_command_is_the_package():
    done = subprocess.run([sys.executable, "-m", "qkit", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: qkit ") and "quantize" in done.stdout
