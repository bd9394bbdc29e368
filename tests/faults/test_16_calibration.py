"""Calibration that goes wrong inside the model: rows that are not finite or overflow, layers that no row reaches, experts that
few tokens reach, layers that run twice. What is left out is counted; what cannot be measured is refused, never just rounded."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama import modeling_llama

from qkit.engine.solving import FEW_TOKENS
from qkit.planning.request import Request
from qkit.workflows.calibration_rows import calibration_of
from qkit.workflows.quantize import open_structure

COUNT, LENGTH = 64, 16


@pytest.fixture
def rows(calib):
    """Options of 64 short rows."""
    return ["--calib", calib, "--samples", COUNT, "--seqlen", LENGTH, "--threads", 1, "--group-size", 32]


@pytest.fixture
def token_in(calib):
    """``token_in(model, share)``: a token id that is in so many of the rows, or as near as there is one."""

    def find(model, wanted: int) -> tuple[int, int]:
        made = calibration_of(
            Request(model=str(model), calib=calib, samples=COUNT, seqlen=LENGTH), open_structure(str(model))
        )
        held = {int(t): int((made.tokens == t).any(1).sum()) for t in made.tokens.unique()}
        token = min(held, key=lambda t: (abs(held[t] - wanted), t))
        return token, held[token]

    return find


def changed(model, folder, change):
    """A copy of the model with ``change(tensors)`` made to its weights."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def journal(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_bytes().splitlines()]


# ---- rows that are not finite (C3) ----------------------------------------------------------------------------


def huge(token: int):
    """The token's embedding is finite and overflows in the first norm."""

    def change(tensors) -> None:
        table = tensors["gpt_neox.embed_in.weight"]
        table[token] = 3e38 * torch.tensor([1, -1]).repeat(table.shape[1] // 2)

    return change


@pytest.mark.parametrize(
    "options",
    [
        ("w4a16", "gptq"),
        ("w4a16", "gptq", "--option", "compensate=0.5"),
        ("w4a16", "auto"),
        ("w4a16", "signround", "--effort", "fast"),
        ("w8a8", "smoothquant+gptq"),
        ("fp8", "rtn"),
    ],
    ids=" ".join,
)
def test_one_row_that_is_not_finite_is_left_out_and_counted(run, tiny, rows, token_in, tmp_path, options):
    model = tiny("gpt_neox")
    token, count = token_in(model, 1)
    assert count == 1
    wrong = changed(model, tmp_path / "wrong", huge(token))
    scheme, method, *more = options
    rows = rows if scheme == "w4a16" else rows[:-2]
    command = ("--scheme", scheme, "--method", method, *more, *rows, "--out", tmp_path / "out")
    code, said, err = run("quantize", "--model", wrong, *command)
    assert code == 0 and f"1 of {COUNT} calibration rows were left out: their activations are not finite" in said, err
    entries = journal(tmp_path / "out.job")
    assert all(e["calibration"]["not_finite"] == 1 for e in entries)
    records = [r for e in entries for r in e["linears"].values()]
    assert all(r["fallback"] is None and r["error"] < 1 for r in records)
    if method in ("gptq", "rtn"):
        assert {r["tokens"] for r in records} == {(COUNT - 1) * LENGTH}
    assert run("verify", tmp_path / "out")[0] == 0


def test_many_rows_that_are_not_finite_end_the_run(run, tiny, rows, token_in, tmp_path):
    model = tiny("gpt_neox")
    token, count = token_in(model, COUNT // 5)
    assert 0.1 < count / COUNT < 0.3
    wrong = changed(model, tmp_path / "wrong", huge(token))
    code, _, err = run(
        "quantize", "--model", wrong, "--scheme", "w4a16", "--method", "gptq", *rows, "--out", tmp_path / "out"
    )
    assert code == 4 and f"{count} of {COUNT} calibration samples have non-finite activations" in err and "10%" in err
    assert len(err.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


# ---- layers that no row reaches (C6) --------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gptq", "awq", "gptq+signround", "gptq --option compensate=0.5", "auto"])
def test_a_layer_that_no_row_reaches(run, tiny, rows, tmp_path, monkeypatch, method):
    """There is nothing to measure it by: it is rounded to nearest, and the record says that it saw no token."""
    command = ("--scheme", "w4a16", "--method", *method.split(), *rows, "--out", tmp_path / "out")
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: self.down_proj(x.repeat(1, 1, 2)[..., :96]))
    code, _, err = run("quantize", "--model", tiny("llama"), *command)
    assert code == 0, err
    linears = json.loads((tmp_path / "out" / "qkit.json").read_text())["linears"]
    tokens = {name: entry["tokens"] for name, entry in linears.items()}
    if method.startswith("gptq") and "signround" not in method:  # the others take no statistics when they solve
        assert {n for n, t in tokens.items() if t == 0} == {n for n in tokens if "gate_proj" in n or "up_proj" in n}


# ---- experts that few tokens reach (C7) -----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_experts_that_few_tokens_reach(run, tiny, calib, tmp_path, tokens, method):
    """They are rounded to nearest, the declared policy, and the record counts their tokens exactly."""
    model = tiny("mixtral")
    made = calibration_of(
        Request(model=str(model), calib=calib, samples=COUNT, seqlen=LENGTH), open_structure(str(model))
    )
    ids, counts = made.tokens.unique(return_counts=True)
    rare = int(ids[counts == tokens][0]) if tokens else next(t for t in range(5, 4096) if t not in ids)

    def change(tensors) -> None:
        """All tokens go to experts 0 and 1 of the first block, the rare one to 0 and 2, none to 3."""
        at = "model.layers.0."
        tensors["model.embed_tokens.weight"][:, :2] = torch.tensor([1.0, 0.0])
        tensors["model.embed_tokens.weight"][rare, :2] = torch.tensor([1.0, 50.0])
        tensors[f"{at}self_attn.o_proj.weight"].zero_()
        tensors[f"{at}post_attention_layernorm.weight"].fill_(1.0)
        gate = tensors[f"{at}block_sparse_moe.gate.weight"]
        gate.zero_()
        gate[0, :2], gate[1, 0] = torch.tensor([30.0, 30.0]), 20.0
        gate[2, 1], gate[3, 0] = 20.0, -20.0

    wrong = changed(model, tmp_path / "model", change)
    options = ["--calib", calib, "--samples", COUNT, "--seqlen", LENGTH, "--threads", 1, "--group-size", 32]
    command = ("--scheme", "w4a16", "--method", method, *options, "--out", tmp_path / "out")
    code, _, err = run("quantize", "--model", wrong, *command)
    assert code == 0, err
    first = journal(tmp_path / "out.job")[0]["linears"]
    for expert, wanted in enumerate((COUNT * LENGTH, COUNT * LENGTH - tokens, tokens, 0)):
        for name in ("w1", "w2", "w3"):
            record = first[f"model.layers.0.block_sparse_moe.experts.{expert}.{name}"]
            assert record["tokens"] == wanted and record["fallback"] is None
            if wanted < FEW_TOKENS:
                assert 0 < record["error"] <= record["baseline_error"]
    assert run("verify", tmp_path / "out")[0] == 0


# ---- weights that are used twice (C10) ------------------------------------------------------------------------


def test_a_layer_that_runs_twice_in_its_block(run, tiny, rows, tmp_path, monkeypatch):
    forward = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: forward(self, forward(self, x)))
    command = ("quantize", "--model", tiny("llama"), "--scheme", "w4a16", *rows)
    assert run(*command, "--method", "gptq", "--out", tmp_path / "out")[0] == 0
    linears = json.loads((tmp_path / "out" / "qkit.json").read_text())["linears"]
    once = linears["model.layers.0.self_attn.q_proj"]["tokens"]
    assert linears["model.layers.0.mlp.gate_proj"]["tokens"] == 2 * once  # the inputs of both runs
    assert run(*command, "--method", "rtn", "--out", tmp_path / "rounded")[0] == 0  # weights alone decide


def test_blocks_that_run_twice(run, tiny, rows, tmp_path, monkeypatch):
    """A model that loops over its blocks: only the first round would be measured."""
    norm = modeling_llama.LlamaModel.forward

    def twice(self, *args, **kwargs):
        loop, self.layers = self.layers, torch.nn.ModuleList([*self.layers, *self.layers])
        config, self.config.num_hidden_layers = self.config.num_hidden_layers, len(self.layers)
        try:
            return norm(self, *args, **kwargs)
        finally:
            self.layers, self.config.num_hidden_layers = loop, config

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", twice)
    command = ("quantize", "--model", tiny("llama"), "--scheme", "w4a16", *rows)
    code, _, err = run(*command, "--method", "gptq", "--out", tmp_path / "out")
    assert code == 3 and "runs more than once in a pass of the model" in err, err
    assert len(err.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_blocks_that_share_their_weights(run, tiny, rows, tmp_path):
    """A file that stores the weights of one block for two is not taken for a whole one."""
    wrong = tmp_path / "shared"
    shutil.copytree(tiny("llama"), wrong)
    tensors = load_file(wrong / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if ".layers.1." not in n or "_proj" not in n}
    save_file(kept, wrong / "model.safetensors", {"format": "pt"})
    code, _, err = run("plan", "--model", wrong, "--scheme", "w4a16", "--method", "gptq", *rows)
    assert code == 3 and "model.layers.1." in err and len(err.strip().splitlines()) == 1


# ---- float16 models that overflow (C12) -----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gptq", "awq", "signround"])
def test_a_float16_model_that_overflows(run, tiny, rows, token_in, tmp_path, method):
    """Statistics are in float32, so nothing is lost; rows that float16 cannot hold are counted, and bfloat16 suggested."""
    model = tiny("llama", torch.float16)
    token, count = token_in(model, 3)

    def change(tensors) -> None:
        tensors["model.embed_tokens.weight"][token] = 60000.0
        tensors["model.layers.0.mlp.down_proj.weight"] *= 20000

    wrong = changed(model, tmp_path / "wrong", change)
    command = ("--scheme", "w4a16", "--method", method, *rows, "--out", tmp_path / "out")
    code, said, err = run("quantize", "--model", wrong, *command)
    assert code == 0, err
    said = " ".join(said.split())
    entries = journal(tmp_path / "out.job")
    told = [e["calibration"]["beyond_dtype"] for e in entries if "calibration" in e]
    assert told and max(told) >= count and "not finite" not in said
    assert f"{max(told)} of {COUNT} calibration rows have activations that float16 cannot hold" in said
    assert "quantize a bfloat16 checkpoint" in said
    assert all(r["fallback"] is None for e in entries for r in e["linears"].values())


def test_a_sound_float16_model_is_not_warned_of(run, tiny, rows, tmp_path):
    command = ("--scheme", "w4a16", "--method", "gptq", *rows, "--out", tmp_path / "out")
    code, said, err = run("quantize", "--model", tiny("llama", torch.float16), *command)
    assert code == 0 and "cannot hold" not in said and "left out" not in said, err
    assert all("calibration" not in e for e in journal(tmp_path / "out.job"))
