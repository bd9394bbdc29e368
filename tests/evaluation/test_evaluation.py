"""Texts and tasks on tiny models, refused task code, and the commands."""

from __future__ import annotations

import io
import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from qkit.commands.check import check_command, checks_table
from qkit.commands.eval import eval_command, split_names
from qkit.commands.measured import json_bytes, show
from qkit.errors import BadInput, BudgetNotMet, QkitError, Unsupported, UsageError
from qkit.evaluation.budget import Check, check_budget, load_budget
from qkit.evaluation.request import jsonable
from qkit.evaluation.sources import read_text, text_name
from qkit.evaluation.taskcode import refuse_task_code
from qkit.evaluation.text import evaluate_text
from qkit.workflows.check import choose_texts

WORDS = "the a cat dog tree runs sleeps over under quick and slow house garden river stone".split()


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: at for at, word in enumerate(["[UNK]", "[EOS]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]", bos_token="[EOS]")


def make_model(seed: int, noise: float = 0.0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    return model


def make_text(count: int, seed: int) -> str:
    picks = torch.randint(0, len(WORDS), (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[pick] for pick in picks)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def texts(tmp_path):
    files = []
    for seed, name in enumerate(("first", "second")):
        file = tmp_path / f"{name}.txt"
        file.write_text(make_text(32 * 7 + 3, seed))
        files.append(file)
    return files


def test_texts_without_a_baseline(tokenizer, texts):
    model = make_model(0)
    figures = evaluate_text(model, tokenizer, texts, window=32, limit=5)["texts"]
    assert list(figures) == ["first", "second"]
    entry = figures["first"]
    assert set(entry) == {"perplexity", "ci", "windows", "tokens", "nonfinite"}
    assert (entry["windows"], entry["tokens"], entry["nonfinite"]) == (5, 5 * 31, 0)
    assert entry["ci"][0] < entry["perplexity"] < entry["ci"][1]
    # a loop in float64 over the same windows
    ids = torch.tensor(tokenizer(texts[0].read_text())["input_ids"])
    total = 0.0
    slow = make_model(0).double()
    for row in range(5):
        window = ids[row * 32 : row * 32 + 32]
        with torch.no_grad():
            logits = slow(input_ids=window[None]).logits[0]
        total += sum(float(logits[i].logsumexp(-1) - logits[i, window[i + 1]]) for i in range(31))
    assert entry["perplexity"] == pytest.approx(math.exp(total / (5 * 31)), rel=1e-6)


def test_texts_with_a_baseline(tokenizer, texts):
    model, other = make_model(0), make_model(0, noise=0.02)
    same = evaluate_text(model, tokenizer, texts, 32, 5, baseline_model=make_model(0))["texts"]["second"]
    assert (same["kl"]["mean"], same["kl"]["p99"], same["same_top1"]) == (0.0, 0.0, 1.0)
    assert (same["change_percent"], same["change_ci"]) == (0.0, [0.0, 0.0])
    entry = evaluate_text(other, tokenizer, texts, 32, None, baseline_model=model)["texts"]["second"]
    assert entry["windows"] == 7
    assert entry["baseline_perplexity"] == pytest.approx(
        evaluate_text(model, tokenizer, texts, 32, None)["texts"]["second"]["perplexity"], rel=1e-6
    )
    change = 100 * (entry["perplexity"] / entry["baseline_perplexity"] - 1)
    assert entry["change_percent"] == pytest.approx(change, rel=1e-6, abs=1e-9)
    assert entry["change_ci"][0] <= change <= entry["change_ci"][1]
    assert 0 < entry["kl"]["mean"] < entry["kl"]["p99"]
    assert entry["kl"]["ci"][0] < entry["kl"]["mean"] < entry["kl"]["ci"][1]
    assert 0.5 < entry["same_top1"] <= 1.0


def test_a_broken_model_is_measured_as_broken(tokenizer, texts, tmp_path):
    model = make_model(0)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = math.nan
    figures = evaluate_text(model, tokenizer, texts, 32, 5, baseline_model=make_model(0))
    entry = figures["texts"]["first"]
    assert entry["nonfinite"] == entry["tokens"]
    assert math.isnan(entry["perplexity"]) and math.isnan(entry["kl"]["p99"]) and entry["same_top1"] == 0.0
    written = json.loads(json_bytes(figures))
    assert written["texts"]["first"]["perplexity"] is None
    (tmp_path / "b.yaml").write_text("perplexity.first: +1000%\nkl.mean.first: 1e9\nkl.p99.first: 1e9\n")
    budget = load_budget(tmp_path / "b.yaml")
    assert [check.ok for check in check_budget(budget, figures)] == [False] * 3
    assert [check.ok for check in check_budget(budget, written)] == [False] * 3
    show(figures, Console(file=open(os.devnull, "w"), width=200))


@pytest.mark.parametrize("screen", [False, True])
def test_tables_are_never_cut_short(tokenizer, texts, screen):
    """In a pipe of no width every figure is on one line; on a narrow screen it goes on in the next."""
    figures = evaluate_text(make_model(0), tokenizer, texts, 32, 5, baseline_model=make_model(1))
    file = io.StringIO()
    show(figures, Console(file=file, width=60, force_terminal=screen))
    shown = file.getvalue()
    first = figures["texts"]["first"]
    assert "\u2026" not in shown and (screen or "first" in shown)
    assert screen or f"{first['change_percent']:+.2f} [{first['change_ci'][0]:+.2f}, " in shown


def test_how_texts_are_named_and_refused(tokenizer, texts, tmp_path):
    assert text_name(texts[0]) == text_name(str(texts[0])) == "first"
    assert text_name(f"other={texts[0]}") == "other"
    odd = tmp_path / "a=b.txt"
    odd.write_text("x")
    assert text_name(str(odd)) == "a=b"
    assert text_name("dataset:org/wiki:raw:test:text") == "wiki-raw"
    assert text_name("dataset:wiki") == "wiki"
    with pytest.raises(UsageError, match="not a data set"):
        text_name("dataset:")
    with pytest.raises(BadInput, match="no such file"):
        text_name(tmp_path / "none.txt")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(BadInput, match="byte 3 is not UTF-8"):
        read_text(latin)
    model = make_model(0)
    with pytest.raises(UsageError, match="two texts are called 'first'"):
        evaluate_text(model, tokenizer, [texts[0], f"first={texts[1]}"], 32, 1)
    with pytest.raises(BadInput, match="text 'first': the text has 227 tokens"):
        evaluate_text(make_model(0), tokenizer, texts, 228, 1)
    with pytest.raises(UsageError, match="max_position_embeddings is 128"):
        evaluate_text(model, tokenizer, texts, 129, 1)


def test_local_data_sets(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "test.jsonl").write_text('{"body": "one two"}\n{"body": "three"}\n')
    assert read_text(f"dataset:{tmp_path}::test:body") == "one two\n\nthree"
    with pytest.raises(BadInput, match="no column 'text'; it has body"):
        read_text(f"dataset:{tmp_path}")
    with pytest.raises(BadInput, match="cannot be loaded"):
        read_text(f"dataset:{tmp_path}::train")


# --- tasks --------------------------------------------------------------------------------------------------------

TASK = """\
task: my_task
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def make_task(folder: Path) -> Path:
    folder.mkdir()
    rows = [{"text": make_text(5, i), "choices": WORDS[i : i + 3], "answer": i % 3} for i in range(8)]
    (folder / "data.json").write_text("\n".join(map(json.dumps, rows)))
    (folder / "my_task.yaml").write_text(TASK.format(data=folder / "data.json"))
    return folder


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("an attempt to use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_tasks_of_a_folder(tokenizer, tmp_path, no_network):
    pytest.importorskip("lm_eval.models.huggingface")
    from qkit.evaluation.harness import paired_change, run_tasks

    folder = make_task(tmp_path / "tasks")
    before = dict(os.environ)
    model = make_model(0)
    found = run_tasks(model, tokenizer, ["my_task"], include_path=folder)
    assert dict(os.environ) == before
    assert tokenizer.pad_token is None  # lm-eval worked on a copy
    entry = found["my_task"]
    acc = entry["metrics"]["acc"]
    assert entry["samples"] == len(acc["values"]) == 8
    assert acc["value"] == pytest.approx(sum(acc["values"]) / 8)
    assert acc["higher_is_better"] is True
    half = 1.96 * acc["stderr"]
    assert acc["ci"] == pytest.approx([acc["value"] - half, acc["value"] + half], rel=1e-4)
    # the same choice by hand: the word with the greatest likelihood after the text
    rows = [json.loads(line) for line in (folder / "data.json").read_text().splitlines()]
    for row, value in zip(rows, acc["values"], strict=True):
        ids = torch.tensor(tokenizer(row["text"])["input_ids"])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, -1]
        best = max(range(3), key=lambda i: float(logits[tokenizer(row["choices"][i])["input_ids"][0]]))
        assert value == float(best == row["answer"])
    assert run_tasks(model, tokenizer, ["my_task"], limit=3, include_path=folder)["my_task"]["samples"] == 3
    same = paired_change(acc, acc)
    assert (same["change"], same["change_ci"], same["flips"]) == (0.0, [0.0, 0.0], 0.0)
    assert same["flips_ci"][0] == 0.0 < same["flips_ci"][1] < 0.5
    assert same.keys() == {"change", "change_ci", "flips", "flips_ci"}
    assert paired_change(acc, {**acc, "values": None}) is None


def test_data_of_a_task_that_is_not_there(tokenizer, tmp_path, no_network):
    pytest.importorskip("lm_eval.models.huggingface")
    from qkit.evaluation.harness import run_tasks

    folder = make_task(tmp_path / "tasks")
    (folder / "data.json").unlink()
    with pytest.raises(BadInput, match="lm-eval cannot load my_task"):
        run_tasks(make_model(0), tokenizer, ["my_task"], include_path=folder)


@pytest.mark.slow  # lm-eval reads its 14,000 task files
def test_unknown_tasks_are_named_with_a_suggestion(tokenizer, tmp_path, no_network):
    pytest.importorskip("lm_eval.models.huggingface")
    from qkit.evaluation.harness import run_tasks

    folder = make_task(tmp_path / "tasks")
    with pytest.raises(UsageError, match="no task called 'my_taks'; did you mean 'my_task'"):
        run_tasks(make_model(0), tokenizer, ["my_taks"], include_path=folder)
    with pytest.raises(UsageError, match="no task called 'arc_easi'; did you mean 'arc_easy'"):
        run_tasks(make_model(0), tokenizer, ["my_task", "arc_easi"], include_path=folder)


def test_shipped_tasks_need_no_network(tokenizer, no_network):
    pytest.importorskip("lm_eval.models.huggingface")
    from qkit.evaluation.harness import run_tasks, shipped_tasks

    assert {"qkit_cloze", "qkit_text"} <= set(shipped_tasks())
    found = run_tasks(make_model(0), tokenizer, ["qkit_cloze", "qkit_text"], limit=2)
    assert list(found) == ["qkit_cloze", "qkit_text"]
    assert found["qkit_cloze"]["samples"] == found["qkit_text"]["samples"] == 2
    assert 0 <= found["qkit_cloze"]["metrics"]["acc"]["value"] <= 1
    assert found["qkit_text"]["metrics"]["word_perplexity"]["stderr"] is None
    refuse_task_code(shipped_tasks()["qkit_cloze"].parent, {"acc", "acc_norm", "exact_match", *ROLLING})


ROLLING = ("word_perplexity", "byte_perplexity", "bits_per_byte")


def test_without_lm_eval_the_advice_is_one_sentence():
    program = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from qkit.errors import Unsupported\n"
        "from qkit.evaluation.harness import run_tasks\n"
        "try: run_tasks(None, None, ['x'])\n"
        "except Unsupported as error: print(error)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=True)
    assert "pip install qkit[eval]" in done.stdout


METRICS = {"acc", "exact_match"}


def test_plain_tasks_are_let_through(tmp_path):
    folder = make_task(tmp_path / "tasks")
    (folder / "base.txt").write_text("doc_to_text: \"{{question.strip()}} {{choices[0]}} {{a['b']}} {{c[label]}}\"\n")
    (folder / "more.yaml").write_text("include: base.txt\ntask: more\nuse_prompt: null\nmetadata: {version: 1.0}\n")
    refuse_task_code(folder, METRICS)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("process_docs: !function utils.process", "tag '!function'"),
        ("process_docs: !<!function> utils.process", "tag '!function'"),
        ("process_docs: !%66unction utils.process", "tag '!function'"),
        ("x: !!python/object/apply:os.system ['true']", "python/object/apply"),
        ("deep: [{a: [{b: !function x.y}]}]", "tag '!function'"),
        ("!function x.y: 1", "tag '!function'"),
        ("class: x.Task", "key 'class'"),
        ("custom_dataset: x", "key 'custom_dataset'"),
        ("unsafe_code: true", "key 'unsafe_code'"),
        ("use_prompt: other.yaml:all", "key 'use_prompt'"),
        ("dataset_kwargs: {trust_remote_code: true}", "key 'trust_remote_code'"),
        ("metric_list: [{metric: ./script}]", "metric './script'"),
        ("metric_list: [{metric: acc, hf_evaluate: true}]", "key 'hf_evaluate'"),
        ("dataset_path: pandas", "pickled"),
        ('doc_to_text: "{{ x.__class__ }}"', "template"),
        ("doc_to_text: \"{{ x['__class__'] }}\"", "template"),
        ("doc_to_text: \"{{ x['_' ~ '_class_'] }}\"", "template"),
        ('doc_to_text: "{{ x[a][b] }}"', "template"),
        ('doc_to_text: "{{ x|attr(y) }}"', "template"),
        ('doc_to_text: "{% for i in range(9) %}{% endfor %}"', "template"),
        ('doc_to_text: "{{ cycler.next(1) }}"', "template"),
        ("include: ../../elsewhere.txt", "tag '!function'"),
    ],
)
def test_task_code_is_refused(tmp_path, line, reason):
    (tmp_path / "elsewhere.txt").write_text("a: !function x.y\n")
    folder = make_task(tmp_path / "tasks")
    nested = folder / "deeper"
    nested.mkdir()
    (nested / "bad.yaml").write_text(f"task: bad\n{line}\n")
    with pytest.raises(Unsupported, match=re.escape(reason)) as error:
        refuse_task_code(folder, METRICS)
    assert "--allow-task-code" in str(error.value)
    assert "line 1" in str(error.value) if "include" in line else "bad.yaml, line 2" in str(error.value)


def test_task_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(BadInput, match="not a folder"):
        refuse_task_code(tmp_path / "none", METRICS)
    for content in ("a: [", "a: \x00", "a: 1\n---\nb: 2\n"):
        (tmp_path / "t.yaml").write_text(content)
        with pytest.raises(BadInput, match="not valid YAML"):
            refuse_task_code(tmp_path, METRICS)
    (tmp_path / "t.yaml").write_text("include: gone.yaml\n")
    with pytest.raises(BadInput, match="cannot be read"):
        refuse_task_code(tmp_path, METRICS)
    (tmp_path / "t.yaml").write_text("a: &x [*x]\n")
    refuse_task_code(tmp_path, METRICS)


def test_a_folder_with_code_runs_only_when_that_is_allowed(tokenizer, tmp_path, no_network):
    pytest.importorskip("lm_eval.models.huggingface")
    from qkit.evaluation.harness import run_tasks

    folder = make_task(tmp_path / "tasks")
    (folder / "payload.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef process(docs):\n    return docs\n"
    )
    with (folder / "my_task.yaml").open("a") as file:
        file.write("process_docs: !function payload.process\n")
    with pytest.raises(Unsupported, match="!function"):
        run_tasks(make_model(0), tokenizer, ["my_task"], include_path=folder)
    assert not (tmp_path / "ran").exists()
    run_tasks(make_model(0), tokenizer, ["my_task"], allow_task_code=True, include_path=folder)
    assert (tmp_path / "ran").exists()


# --- commands -----------------------------------------------------------------------------------------------------


def test_texts_of_a_budget(tmp_path, texts):
    path = tmp_path / "budget.yaml"

    def chosen(content: str, *given: Path) -> list[str]:
        path.write_text(content)
        return choose_texts(load_budget(path), [str(file) for file in given], path)

    first = str(texts[0])
    assert chosen("size: 1MB\n", texts[0]) == []
    assert chosen("perplexity: 40\n", texts[0]) == [first]
    assert chosen("perplexity.first: 40\n", texts[0]) == [first]
    assert chosen("perplexity: 40\ntexts: {w: second.txt}\n") == [f"w={texts[1]}"]
    assert chosen("perplexity: 40\ntexts: {w: second.txt, first: none.txt}\n", texts[0]) == [first, f"w={texts[1]}"]
    with pytest.raises(UsageError, match="no text is called 'wiki'; add it under texts:, or --text wiki=FILE"):
        chosen("perplexity.wiki: 40\n", texts[0])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, noise in (("original", 0.0), ("noisy", 0.02)):
        make_model(0, noise).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return folder


def run(*arguments: object) -> str:
    """Output of a command; an error that qkit raises on purpose is raised here."""
    command = {"eval": eval_command, "check": check_command}[str(arguments[0])]
    result = CliRunner().invoke(command, [str(argument) for argument in arguments[1:]], env={"COLUMNS": "200"})
    if result.exception is not None:
        raise result.exception
    return result.output


def test_eval(models, texts, tmp_path):
    out = tmp_path / "eval.json"
    common = ("--window", 32, "--windows", 5, "--json", out)
    shown = run("eval", models / "noisy", "--baseline", models / "original", "--text", texts[0], *common)
    found = json.loads(out.read_text())
    want = evaluate_text(make_model(0, 0.02), make_tokenizer(), [texts[0]], 32, 5, baseline_model=make_model(0))
    assert found["texts"]["first"]["perplexity"] == pytest.approx(want["texts"]["first"]["perplexity"], rel=1e-5)
    assert found["texts"]["first"]["kl"]["mean"] == pytest.approx(want["texts"]["first"]["kl"]["mean"], rel=1e-3)
    assert found["size"]["bytes"] == found["size"]["baseline_bytes"] > 0
    assert (found["model"], found["baseline"], found["dtype"]) == ("noisy", "original", "float32")
    for column in ("text", "perplexity", "baseline", "change %", "KL mean", "KL p99", "same top-1", "first"):
        assert column in shown
    alone = run("eval", models / "noisy", "--text", f"other={texts[0]}", *common)
    assert "other" in alone and "KL" not in alone
    assert json.loads(out.read_text())["texts"]["other"]["perplexity"] == found["texts"]["first"]["perplexity"]


def test_eval_of_the_embedded_text(models):
    assert "evaluation" in run("eval", models / "noisy", "--window", 32, "--windows", 2)


def test_eval_of_tasks(models, tmp_path):
    pytest.importorskip("lm_eval.models.huggingface")
    out, folder = tmp_path / "eval.json", make_task(tmp_path / "tasks")
    arguments = ("--baseline", models / "original", "--tasks", "my_task", "--task-dir", folder, "--json", out)
    shown = run("eval", models / "noisy", *arguments)
    acc = json.loads(out.read_text())["tasks"]["my_task"]["metrics"]["acc"]
    before = json.loads(out.read_text())["baseline_tasks"]["my_task"]["metrics"]["acc"]
    assert acc["change"] == pytest.approx(acc["value"] - before["value"])
    assert acc["change_ci"][0] <= acc["change"] <= acc["change_ci"][1]
    assert "values" not in acc and "values" not in before
    assert "my_task" in shown and "acc" in shown


def test_check(models, texts, tmp_path):
    budget, junit, out = tmp_path / "budget.yaml", tmp_path / "check.xml", tmp_path / "check.json"
    lines = "perplexity.first: +{}%\nkl.mean: {}\nsize: 1x\nsame_top1: 0.5\ntexts: {{first: first.txt}}\nwindow: 32\n"
    arguments = ("check", models / "noisy", "--budget", budget, "--junit", junit, "--json", out)
    with_baseline = (*arguments, "--baseline", models / "original")

    budget.write_text(lines.format(50, 10))
    assert "FAILED" not in run(*with_baseline)
    suite = ElementTree.parse(junit).getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("4", "0")

    budget.write_text(lines.format(50, 0))
    with pytest.raises(BudgetNotMet, match=r"1 of 4 limits of .* are not met: kl\.mean\.first") as error:
        run(*with_baseline)
    assert error.value.exit_code == 4
    suite = ElementTree.parse(junit).getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("4", "1")
    checks = json.loads(out.read_text())["checks"]
    assert [(check["name"], check["ok"]) for check in checks] == [
        ("perplexity.first", True),
        ("kl.mean.first", False),
        ("size", True),
        ("same_top1.first", True),
    ]
    with pytest.raises(
        UsageError, match=r"perplexity.first, kl.mean, size, same_top1 need the original model: add --baseline"
    ):
        run(*arguments)

    budget.write_text("size: 1B\n")  # needs neither a baseline nor a text
    with pytest.raises(BudgetNotMet, match="1 of 1 limits"):
        run(*arguments)


def test_a_model_that_is_not_there(texts):
    for command in (("eval", "no-such-model"), ("eval", "tiny-llama", "--baseline", "no-such-model")):
        with pytest.raises(QkitError, match="no-such-model: no such"):
            run(*command, "--text", texts[0])
    with pytest.raises(UsageError, match="device 'cuda:99' cannot be used"):
        run("eval", "tiny-llama", "--device", "cuda:99", "--text", texts[0])
    with pytest.raises(UsageError, match="--allow-task-code"):
        run("eval", "tiny-llama", "--allow-task-code")


def test_help_has_an_example():
    for name in ("eval", "check"):
        assert f"qkit {name} out/" in run(name, "--help")


def test_small_things():
    assert split_names(" a, b ,,a") == ["a", "b"]
    assert split_names(None) == []
    assert jsonable({"a": [math.nan, 1.0, (math.inf,)], "b": True}) == {"a": [None, 1.0, [None]], "b": True}
    console = Console(width=100, record=True, file=open(os.devnull, "w"))
    console.print(checks_table([Check("a\x1b[31m[red]", "<= 1", math.nan, False), Check("b", "<= 1", 0.5, True)]))
    text = console.export_text()
    assert "a?[31m[red]" in text and "not a finite number" in text and "FAILED" in text and "ok" in text
