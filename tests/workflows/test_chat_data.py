"""Whole runs on chats: what the command says and records, padding that counts nowhere, and jobs that go on."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from chats import turns, with_template, write_lines
from conftest import Quiet, Stops

from qkit.errors import JobConflict, UsageError
from qkit.workflows.quantize import Request, prepare, quantize

ROWS = ("--samples", 12, "--seqlen", 64, "--threads", 1, "--group-size", 32)


@pytest.fixture
def model(tiny, tmp_path: Path) -> Path:
    return with_template(tiny("llama"), tmp_path / "model")


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "chat.jsonl", [{"messages": turns(i)} for i in range(40)])


@pytest.fixture
def asked(model: Path, lines: Path) -> Request:
    return Request(
        model=str(model), scheme="w4a16", method="gptq", group_size=32, calib=lines, samples=12, seqlen=64, threads=1
    )


def sums(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("*.safetensors")}


def journal(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out.parent / f"{out.name}.job" / "journal.jsonl").read_text().splitlines()]


def test_the_command_says_and_records_what_it_understood(run, model, lines, tmp_path):
    out, text = (
        tmp_path / "out",
        write_lines(tmp_path / "t.jsonl", [{"text": "Some words. " * 40 + str(i)} for i in range(9)]),
    )
    command = ("quantize", "--model", model, "--scheme", "w4a16", "--method", "gptq", *ROWS, "--out", out)
    code, said, err = run(*command, "--calib", f"{lines}:2", "--calib", text)
    assert code == 0, err
    said = " ".join(said.split())
    assert (
        "calibration: chat.jsonl: 8 samples, 512 tokens, from" in said and "by the chat template of the model" in said
    )
    assert "calibration: t.jsonl: 4 samples, 256 tokens, from" in said and "of 9 records (text)" in said
    assert said.index("calibration: chat.jsonl") < said.index("forecast for method")
    recorded = json.loads((out / "qkit.json").read_text())["calibration"]
    assert [(s["source"], s["weight"], s["rows"]) for s in recorded["sources"]] == [
        ("chat.jsonl", 2, 8),
        ("t.jsonl", 1, 4),
    ]
    assert recorded["sources"][0]["form"] == "messages" and recorded["sources"][0]["total"] == 40
    assert run("verify", out)[0] == 0


@pytest.mark.parametrize(
    "options",
    [{}, {"method": "awq+gptq"}, {"method": "gptq+signround"}, {"kv": "fp8"}, {"embeddings": "int8", "head": "int8"}],
    ids=str,
)
def test_padding_counts_nowhere(asked, model, tmp_path, options):
    """The bytes do not depend on what rows were filled up with, and the record counts the other tokens alone."""
    options = dict(options)
    if options.pop("kv", None):
        from qkit.kvcache.policy import parse

        options["kv"] = parse("fp8").to_json()
    if "signround" in options.get("method", ""):
        options["options"] = {"steps": 4, "batch": 4}
    asked = replace(asked, padded=True, **options)
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "}"}))
    first, second = prepare(asked).plan.calibration, prepare(replace(asked, model=str(other))).plan.calibration
    assert not first.tokens.equal(second.tokens) and first.mask.equal(second.mask)
    quantize(asked, tmp_path / "out", Quiet())
    quantize(replace(asked, model=str(other)), tmp_path / "filled", Quiet())
    assert sums(tmp_path / "out") == sums(tmp_path / "filled")
    records = [r for entry in journal(tmp_path / "out") for r in entry["linears"].values() if "tokens" in r]
    assert {r["tokens"] for r in records} - {None} == {int(first.mask.sum())}  # None: embeddings, which read no inputs


def test_only_answers_are_in_the_statistics(asked, tmp_path):
    asked = replace(asked, padded=True, answers_only=True)
    counted = int(prepare(asked).plan.calibration.mask.sum())
    quantize(asked, tmp_path / "out", Quiet())
    quantize(replace(asked, answers_only=False), tmp_path / "all", Quiet())
    assert {r["tokens"] for e in journal(tmp_path / "out") for r in e["linears"].values()} == {counted}
    assert sums(tmp_path / "out") != sums(tmp_path / "all")


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "gptq+signround", "options": {"steps": 4, "batch": 4, "loss_weighted": True, "e2e_steps": 4}},
        {"significant": 0.1},
        {"synthetic_samples": 6},
        {"method": "gptq", "options": {"compensate": 0.5}},
    ],
    ids=str,
)
def test_methods_that_look_at_more(asked, tmp_path, changes):
    """Losses, gradients, end-to-end learning, rows of the original model, rows that the model writes."""
    assert quantize(replace(asked, padded=True, answers_only=True, **changes), tmp_path / "out", Quiet()).ok


def test_a_stopped_job_goes_on_and_sees_changed_data(asked, lines, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    asked = replace(asked, padded=True)
    quantize(asked, whole, Quiet())
    with pytest.raises(KeyboardInterrupt):
        quantize(asked, stopped, Stops(9))
    before = lines.read_text()
    lines.write_text(before.replace("river", "ocean"))
    with pytest.raises(JobConflict):
        quantize(asked, stopped, Quiet())
    lines.write_text(before)
    with pytest.raises(JobConflict):
        quantize(replace(asked, answers_only=True), stopped, Quiet())
    quantize(asked, stopped, Quiet())
    assert sums(stopped) == sums(whole)


def test_a_line_that_is_not_understood_ends_the_command(run, model, lines, tmp_path):
    with lines.open("a") as f:
        f.write('{"messages": [{"role": "user"}]}\n')
    command = ("quantize", "--model", model, "--scheme", "w4a16", "--method", "gptq", *ROWS, "--out", tmp_path / "out")
    code, _, err = run(*command, "--calib", lines)
    assert code == 3 and "chat.jsonl, line 41, turn 1: content is None, expected a text" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_data_is_not_overwritten(run, model, lines, tmp_path):
    before = lines.read_text()
    command = ("plan", "--model", model, "--scheme", "w4a16", "--method", "gptq", *ROWS)
    code, _, err = run(*command, "--calib", f"{lines}:2", "--json", lines)
    assert code == 2 and "that is the file of --calib" in err and lines.read_text() == before


# ---- the embedded data, and none at all --------------------------------------------------------------------------


def test_the_embedded_data_has_chats_in_the_template(model, tiny):
    with_chats, without = (
        prepare(Request(model=str(m), scheme="w4a16", method="gptq", samples=24, seqlen=64)).plan.calibration
        for m in (model, tiny("llama"))
    )
    assert [s["source"] for s in with_chats.understood] == ["calibration.txt", "chats.jsonl"]
    assert [s["rows"] for s in with_chats.understood] == [20, 4] and with_chats.source.endswith("text and chats")
    assert [s["source"] for s in without.understood] == ["calibration.txt"]
    for source, line in zip(with_chats.understood, with_chats.summary, strict=True):  # nobody named these files
        assert line.startswith(f"{source['source']} (comes with qkit): {source['rows']} samples, ")


def test_a_template_that_fails_costs_the_chats_alone(tiny, tmp_path):
    """Commands without --calib worked before the embedded data had chats."""
    broken = with_template(tiny("llama"), tmp_path / "m", "{{ raise_exception('not today') }}")
    rows = prepare(Request(model=str(broken), scheme="w4a16", method="gptq", samples=24, seqlen=64)).plan.calibration
    assert [s["rows"] for s in rows.understood] == [24]
    assert rows.summary[1].startswith("chats.jsonl is left out:") and "not today" in rows.summary[1]


def test_no_data_at_all(run, model, tmp_path):
    """Every row is one that the model writes; the same command gives the same bytes, with any number of workers."""
    command = (
        "quantize",
        "--model",
        model,
        "--scheme",
        "w4a16",
        "--method",
        "gptq",
        "--group-size",
        32,
        "--seqlen",
        32,
    )
    for name, threads in (("one", 1), ("two", 2)):
        options = ("--samples", 0, "--synthetic-samples", 20, "--threads", threads, "--out", tmp_path / name)
        code, said, err = run(*command, *options)
        assert code == 0 and "calibration: 20 synthetic samples of 32 tokens" in said, err
    assert sums(tmp_path / "one") == sums(tmp_path / "two")
    assert {r["tokens"] for e in journal(tmp_path / "one") for r in e["linears"].values()} == {640}
    recorded = json.loads((tmp_path / "one" / "qkit.json").read_text())["calibration"]
    assert (recorded["samples"], recorded["written"], recorded["source"]) == (0, 20, "synthetic")


@pytest.mark.parametrize(
    "changes", [{"method": "gptq+signround", "options": {"steps": 4, "batch": 4}}, {"significant": 0.1}], ids=str
)
@pytest.mark.parametrize("bos", [1, None])
def test_no_data_with_other_methods_and_without_a_first_token(tiny, tmp_path, changes, bos):
    folder = shutil.copytree(tiny("llama"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "bos_token_id": bos, "eos_token_id": None}))
    asked = {"scheme": "w4a16", "method": "gptq", "group_size": 32, "samples": 0, "seqlen": 16, "synthetic_samples": 12}
    assert quantize(Request(model=str(folder), **{**asked, **changes}), tmp_path / "out", Quiet()).ok


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"samples": 0}, "--samples 0 --seqlen 64: expected at least 1 sample"),
        ({"samples": 0, "synthetic_samples": 4}, "--samples 0 --calib: without samples no data is read"),
        ({"calib": None, "answers_only": True}, "--answers-only: the embedded data has texts without answers"),
        ({"samples": -1, "synthetic_samples": 4}, "--samples -1 --seqlen 64: expected at least 1 sample"),
    ],
)
def test_options_that_say_nothing(asked, options, complaint):
    with pytest.raises(UsageError, match=complaint):
        prepare(replace(asked, **options))
