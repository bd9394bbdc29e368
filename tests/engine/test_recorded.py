"""Language models whose blocks cannot be run one after another: their inputs are recorded in runs of the whole model."""

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import qkit
from qkit.commands.plan import plan_command
from qkit.engine import recorded
from qkit.engine.parts import RECORDED, row_notices
from qkit.errors import Unsupported
from qkit.families.materialize import load_block, release
from qkit.runtime.loading import load_checkpoint
from qkit.workflows.quantize import open_structure

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import sweep_configs

GPTQ = dict(scheme="w4a16", method="gptq", samples=2, seqlen=16, threads=1)


def first_outputs(model, paths, samples):
    """{path: the first tensor that each call of a block returns}, in runs of the whole model."""
    seen = {path: [] for path in paths}
    for path in paths:
        model.get_submodule(path).register_forward_hook(
            lambda _, args, out, p=path: seen[p].append(recorded._first_tensor(out).clone())
        )
    with torch.no_grad():
        for sample in samples:
            model.base_model(**sample, use_cache=False)
    return seen


# Keys and values of an earlier block; blocks that run several times, with a part that runs between them; a cache that the
# model fills in every run, and blocks that return no hidden states.
@pytest.mark.parametrize("name", ["gemma3n_text", "hrm_text", "xlm"])
def test_recorded_calls_give_what_the_blocks_give_in_the_model(name, tmp_path, monkeypatch):
    source = sweep_configs.save("causal", name, tmp_path / "model")
    record, replayed = recorded.record_inputs, []

    def checked(plan, structure, job, blocks, step):
        found = record(plan, structure, job, blocks, step)
        paths = [b.path for b in blocks.values()]
        model = load_checkpoint(structure.checkpoint, torch.float32)
        wanted = first_outputs(model, paths, plan.calibration.calls(tmp_path))
        for block, rows, calls in found.values():
            module = load_block(structure, block, torch.float32)
            assert rows.dtype == torch.float32 and rows.count == len(wanted[block.path]) > 0
            for i, out in enumerate(wanted[block.path]):
                for _ in range(2):  # a call changes nothing that a later one reads
                    with torch.no_grad():
                        torch.testing.assert_close(calls(module, rows.read(i, i + 1), slice(i, i + 1)), out)
            release(module)
            replayed.append(block.path)
        return found

    monkeypatch.setattr(recorded, "record_inputs", checked)
    monkeypatch.setattr("qkit.planning.plan.run_dtype", lambda stored: torch.float32)
    qkit.quantize(source, out=tmp_path / "out", **GPTQ)
    assert replayed == [b.path for b in open_structure(str(source)).every_block]
    linears = json.loads((tmp_path / "out" / "qkit.json").read_text())["linears"]
    assert all(linear["solver"] == "gptq" and linear["tokens"] for linear in linears.values())


def test_a_model_that_does_not_fit_into_memory_is_read_block_by_block(tmp_path, monkeypatch):
    source = sweep_configs.save("causal", "dory", tmp_path / "model")
    monkeypatch.setattr("qkit.planning.plan.run_dtype", lambda stored: torch.float32)
    outs = []
    for fits in (True, False):
        monkeypatch.setattr(recorded, "whole_fits", lambda *_, fits=fits: fits)
        qkit.quantize(source, out=tmp_path / f"{fits}", **GPTQ)
        outs.append(load_file(tmp_path / f"{fits}" / "model.safetensors"))
    assert outs[0].keys() == outs[1].keys() and all(torch.equal(outs[0][n], outs[1][n]) for n in outs[0])


def test_a_part_between_the_blocks_of_the_model_is_known_before_a_run(tmp_path):
    structure = open_structure(str(sweep_configs.save("causal", "hrm_text", tmp_path / "model")))
    assert [structure.is_recorded(s) for s in structure.sequences] == [True, True]


def test_a_plan_says_whose_inputs_will_be_recorded_and_what_a_trial_decides(tmp_path):
    known = sweep_configs.save("causal", "hrm_text", tmp_path / "hrm_text")
    tried = sweep_configs.save("causal", "granite", tmp_path / "granite")
    common = ["--scheme", "w4a16", "--samples", "2", "--seqlen", "32"]
    said = {}
    for folder, method in ((known, "gptq"), (known, "rtn"), (tried, "gptq"), (tried, "rtn")):
        found = CliRunner().invoke(plan_command, ["--model", str(folder), "--method", method, *common])
        assert found.exit_code == 0
        said[folder.name, method] = " ".join(found.output.split())
    recorded, trial = "their inputs are recorded in runs of the whole original model", "a trial of one sample shows"
    assert [recorded in x for x in said.values()] == [True, False, False, False]
    assert [trial in x for x in said.values()] == [False, False, True, False]


def test_all_parts_of_a_text_model_run_on_a_text_where_the_run_without_values_stops(tmp_path):
    structure = open_structure(str(sweep_configs.save("causal", "blt", tmp_path / "model")))
    assert not structure.family.reads.whole
    assert len(structure.towers) == 4 and all(t.on_text and structure.is_recorded(t) for t in structure.towers)


def test_a_model_that_mixes_float32_with_its_dtype_runs_in_float32(tmp_path):
    source = sweep_configs.save("causal", "xlnet", tmp_path / "model")
    qkit.quantize(source, out=tmp_path / "out", **GPTQ)
    linears = json.loads((tmp_path / "out" / "qkit.json").read_text())["linears"]
    assert linears and all(linear["tokens"] for linear in linears.values())


def test_it_is_said_and_a_cache_is_refused(tmp_path):
    assert (
        "2 blocks cannot be run one after another"
        in row_notices([{RECORDED: True}, {RECORDED: True}, {}], "bfloat16")[0]
    )
    assert row_notices([{}], "bfloat16") == []
    source = sweep_configs.save("causal", "hrm_text", tmp_path / "model")
    with pytest.raises(Unsupported, match="leave --kv out"):
        qkit.quantize(source, out=tmp_path / "out", kv="fp8", **GPTQ)
