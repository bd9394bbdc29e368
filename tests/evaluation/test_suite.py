"""The figures of ``qkit eval --suite``, each against another way to get it; and the command, its page and qkit report."""

import io
import json
import math
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import qkit_data
import torch
from rich.console import Console

from qkit.calibration.chats import Chats
from qkit.commands.suite_tables import suite_grids
from qkit.evaluation import suite
from qkit.evaluation.continuations import greedy_continuation
from qkit.evaluation.harness import paired_change
from qkit.evaluation.metrics import Comparison, compare_windows
from qkit.evaluation.suite import evaluate_suite, long_context, read_prompts, text_figures
from qkit.evaluation.text import first_tokens
from qkit.runtime.loading import load, load_tokenizer
from qkit.workflows.api import quantize

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<me>{% endif %}"
)
TEXT = str(qkit_data.text_path("evaluation"))


@pytest.fixture(scope="module")
def results(tiny, tmp_path_factory):
    """(original, a little and much rounded), folders."""
    folder, original = tmp_path_factory.mktemp("results"), tiny("llama")
    for scheme in ("w8a16", "w2a16"):
        quantize(model=str(original), scheme=scheme, group_size=32, out=str(folder / scheme))
    return original, folder / "w8a16", folder / "w2a16"


@pytest.fixture(scope="module")
def loaded(results):
    return [load(folder, dtype=torch.float32) for folder in results]


@pytest.fixture
def few(monkeypatch, tmp_path):
    """Prompts that take a moment."""
    lines = qkit_data.prompts_path().read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) == 24
    (tmp_path / "prompts.jsonl").write_text("".join(lines[:6]), encoding="utf-8")
    monkeypatch.setattr(suite, "embedded_prompts", lambda: tmp_path / "prompts.jsonl")
    return read_prompts(tmp_path / "prompts.jsonl")


@pytest.fixture
def short(monkeypatch, few):
    """Answers that take a moment."""
    monkeypatch.setattr(suite, "NEW_TOKENS", 12)
    monkeypatch.setattr(suite, "EXAMPLES", 2)


def test_flips_and_recovery():
    reference_right = torch.tensor([[True, True, True, False], [True, False, False, False]])
    approx_right = torch.tensor([[True, False, False, True], [True, False, False, False]])
    nll = torch.tensor([[1.0, 2.0, 3.0, 2.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    same = reference_right == approx_right
    found = text_figures(Comparison(nll, nll + 0.1, torch.zeros_like(nll), same, reference_right, approx_right))
    assert found["flips"]["percent"] == pytest.approx(37.5)
    assert (found["flips"]["lost"], found["flips"]["gained"]) == (25.0, 12.5)
    assert found["recovery"]["percent"] == pytest.approx(100 * math.exp(-0.1))
    assert found["recovery"]["ci"] == pytest.approx(
        [found["recovery"]["percent"]] * 2
    )  # the same change in every window
    worse = text_figures(Comparison(nll, nll * 1.1, torch.zeros_like(nll), same, reference_right, approx_right))
    low, high = worse["recovery"]["ci"]
    assert low <= worse["recovery"]["percent"] <= high < 100


def test_right_tokens(loaded):
    tokens = torch.randint(5, 4096, (200,), generator=torch.Generator().manual_seed(3))
    found = compare_windows(loaded[0], loaded[2], tokens, 50)
    windows = tokens.reshape(4, 50)
    for model, right in ((loaded[0], found.reference_right), (loaded[2], found.approx_right)):
        with torch.inference_mode():
            first = model(input_ids=windows).logits[:, :-1].argmax(-1)
        assert torch.equal(right, first == windows[:, 1:])
    assert torch.equal(found.kl == 0, torch.zeros_like(found.kl, dtype=torch.bool))  # other models everywhere


def test_the_agreement_is_that_of_real_answers(results, loaded, few, short):
    """One pass over the baseline's answer finds the place where the model's own answer leaves it."""
    tokenizer = load_tokenizer(results[0])
    found = evaluate_suite(loaded[1:], loaded[0], tokenizer, [TEXT])
    prompts = [p["prompt"] for p in few]
    assert found[0]["chat"]["prompts"] == 6 and not found[0]["chat"]["template"]
    for model, figures in zip(loaded[1:], found, strict=True):
        equal = []
        for ids in Chats(tokenizer).prompts(prompts):
            answers = [greedy_continuation(m, torch.tensor([ids]), 12).tolist() for m in (loaded[0], model)]
            same = [a == b for a, b in zip(*answers, strict=False)]
            equal.append(same.index(False) if False in same else len(same))
        assert figures["chat"]["agreement"]["tokens"] == pytest.approx(sum(equal) / 6)
        assert [e["same"] for e in figures["examples"]] == equal[:2]
        for example in figures["examples"]:
            assert example["said"][: example["same_letters"]] == example["baseline_said"][: example["same_letters"]]
    little, much = (f["chat"] for f in found)
    assert little["agreement"]["tokens"] > much["agreement"]["tokens"]
    assert 0 < little["kl"]["mean"] < much["kl"]["mean"] <= much["kl"]["p99"] <= much["kl"]["p999"]


def test_prompts_in_the_template(results):
    tokenizer = load_tokenizer(results[0])
    plain = Chats(tokenizer).prompts(["Hello there"])
    tokenizer.chat_template = TEMPLATE
    (ids,) = Chats(tokenizer).prompts(["Hello there"])
    assert tokenizer.decode(ids) == "<user> Hello there\n<me>" != tokenizer.decode(plain[0])


def test_answers_stay_within_the_model(results, loaded, few):
    """The model has 128 positions: the prompts leave less than 128 to the answers, and the random model does not end before."""
    (found,) = evaluate_suite(loaded[1:2], loaded[0], load_tokenizer(results[0]), [TEXT])
    room = [128 - len(ids) for ids in Chats(load_tokenizer(results[0])).prompts([p["prompt"] for p in few])]
    assert max(room) < 128 and found["chat"]["agreement"]["of"] == sum(room) / 6


def test_long_context_is_that_of_one_pass(results, loaded, monkeypatch):
    monkeypatch.setattr(suite, "PIECE", 48)  # pieces of other lengths than the ranges
    tokenizer = load_tokenizer(results[0])
    found = long_context(loaded[1:], loaded[0], tokenizer, [TEXT])
    tokens = first_tokens(tokenizer, TEXT, 128)[:128]
    assert found is not None and [f["tokens"] for f in found] == [128, 128]
    for model, figures in zip(loaded[1:], found, strict=True):
        whole = compare_windows(loaded[0], model, tokens, 128).kl[0]
        ends = [(b["from"], b["to"]) for b in figures["buckets"]]
        assert ends[0][0] == 1 and ends[-1][1] == 127 and len(ends) == suite.BUCKETS
        assert all(after[0] == before[1] + 1 for before, after in pairwise(ends))
        for bucket in figures["buckets"]:
            assert bucket["kl"] == pytest.approx(float(whole[bucket["from"] - 1 : bucket["to"]].mean()), rel=1e-3)


def test_flips_of_tasks():
    before, after = ({"values": v} for v in ([1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]))
    found = paired_change(after, before)
    assert found is not None and found["change"] == 0 and found["flips"] == 0.5  # accuracy hides both
    assert "flips" not in (paired_change({"values": [0.5, 1.0]}, {"values": [1.0, 1.0]}) or {})


class Page(HTMLParser):
    """Texts, what is marked, and what the page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.refers: list[str] = []
        self.marks = 0
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.marks += tag == "mark"
        self.refers += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "poster")]

    def handle_data(self, data):
        self.texts.append(data.strip())


def narrow(models: list) -> bool:
    """Whether the tables fit 100 columns, with perplexities as trained models have them."""
    for model in models:
        model["texts"]["evaluation"] |= {"perplexity": 85.09, "ci": [71.16, 102.62], "baseline_perplexity": 85.09}
    console = Console(width=500, file=io.StringIO())
    for grid in suite_grids(models * 2):
        console.print(grid.table())
    lines = console.file.getvalue().splitlines()
    return len(lines) > 60 and max(len(line.rstrip()) for line in lines) <= 100


def test_the_commands(results, run, tmp_path, short):
    original, *outs = results
    page, figures = tmp_path / "page.html", tmp_path / "eval.json"
    common = ("--baseline", original, "--suite", "default", "--window", 64, "--windows", 4, "--limit", 3)
    code, shown, err = run("eval", *outs, *common, "--report", page, "--json", figures)
    assert code == 0, err
    assert "recovery % (95 % ci)" in shown and "note: the model has no chat template" in shown
    models = json.loads(figures.read_text())["models"]
    assert [m["model"] for m in models] == ["w8a16", "w2a16"]
    assert all(m["suite"]["weights"] and m["suite"]["seconds"] > 0 for m in models)
    assert narrow(models)
    found = Page(page.read_text(encoding="utf-8"))
    assert found.refers and all(r.startswith("data:image/svg+xml;base64,") for r in found.refers)
    differing = sum(e["said"] != e["baseline_said"] for m in models for e in m["suite"]["examples"])
    assert found.marks == differing > 0
    for model in models:
        assert all(digest in found.texts for digest in model["suite"]["weights"].values())
    again = tmp_path / "again.html"
    code, _, err = run("report", *outs, "--eval", figures, "--out", again)
    assert code == 0, err
    assert again.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")


def test_what_the_suite_does_not_go_with(results, run):
    original, out, _ = results
    assert run("eval", out, "--suite", "default")[2].startswith(
        "qkit: --suite compares with the original model: add --ba"
    )
    for other in (("--kv", "int8"), ("--retrieval",), ("--image-text", "drawn"), ("--videos", 2)):
        code, _, err = run("eval", out, "--baseline", original, "--suite", "default", *other)
        assert code == 2 and "--suite is for texts" in err
    code, _, err = run("eval", out, "--suite", "default", "--engine", "vllm", "--python", "/bin/sh")
    assert code == 2 and "--suite does not go with --engine" in err
