"""Questions about pictures: figures against plain loops over transformers, budgets, the page with pictures."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
import tiny_vlms
import torch
import transformers
from PIL import Image
from torch.nn import functional

from qkit.calibration.dataset import KINDS
from qkit.calibration.image_text import encode, held_out_image_text, image_text_rows, image_tokens, load_processor
from qkit.evaluation.image_text import evaluate_image_text, likelihoods
from qkit.runtime.loading import load
from qkit.workflows.quantize import Request, quantize

COUNT, LEARNT = 24, 10


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """The folder of a tiny LLaVA that knows the answers to the first LEARNT questions."""
    path = tiny_vlms.make("llava", tmp_path_factory.mktemp("taught") / "taught")
    tiny_vlms.add_processor(path)
    model = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    rows = image_text_rows(
        list(held_out_image_text("drawn", LEARNT)), load_processor(path), image_tokens(model.config), "drawn"
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(25):
        for row, kinds in zip(rows.inputs, rows.kinds, strict=True):
            ids = row["input_ids"][0]
            at = (kinds[: len(ids)] == KINDS.index("answer")).nonzero()[:, 0]
            functional.cross_entropy(model(**row).logits[0, at - 1], ids[at]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def packed(taught, tmp_path_factory, quiet):
    out = tmp_path_factory.mktemp("packed") / "packed"
    quantize(Request(model=str(taught), scheme="w3a16", method="rtn"), out, quiet)
    return out


def both(taught, packed):
    return load(packed, dtype=torch.float32), load(taught, dtype=torch.float32), load_processor(taught)


def test_right_is_what_greedy_decoding_says(taught):
    """Of learnt questions and of others: generation stops after exactly the right answer, or does not."""
    model, processor = load(taught, dtype=torch.float32), load_processor(taught)
    end, wanted, kinds = processor.tokenizer.eos_token_id, [], {}
    for pair in held_out_image_text("drawn", COUNT):
        given = encode(pair, processor, False)
        made = model.generate(**given, max_new_tokens=8, do_sample=False, eos_token_id=end)
        answer = [*processor.tokenizer(f" {pair.answer}").input_ids, end]
        wanted.append(made[0, given["input_ids"].shape[1] :].tolist() == answer)
        kinds.setdefault(pair.kind, []).append(wanted[-1])
    assert 2 < sum(wanted) < COUNT - 2
    found = evaluate_image_text(model, processor, "drawn", COUNT)
    assert found["accuracy"]["percent"] == pytest.approx(100 * sum(wanted) / COUNT)
    assert found["accuracy"]["ci"][0] < found["accuracy"]["percent"] < found["accuracy"]["ci"][1]
    assert {k: v["accuracy"]["percent"] for k, v in found["kinds"].items()} == {
        k: pytest.approx(100 * sum(v) / len(v)) for k, v in kinds.items()
    }
    assert sum(v["questions"] for v in found["kinds"].values()) == found["questions"] == COUNT
    assert found["nonfinite"] == 0 and "kl" not in found and "examples" not in found


def test_against_the_original(taught, packed):
    """Every figure from a loop in float64, a question at a time; hidden states as the last block hands them on."""
    model, original, processor = both(taught, packed)
    found = evaluate_image_text(model, processor, "drawn", COUNT, original)
    nlls, kls, same, errors = ([], []), [], [], {"vision": [], "text": [], "answer": []}
    for pair in held_out_image_text("drawn", COUNT):
        row = encode(pair, processor, True)
        ids = row["input_ids"][0]
        end = int((ids == processor.tokenizer.eos_token_id).nonzero()[0])
        start = encode(pair, processor, False)["input_ids"].shape[1]
        seen, logs = [], []
        for m in (model, original):
            handle = m.model.language_model.layers[-1].register_forward_hook(
                lambda module, args, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
            )
            logits = m(**row).logits[0, start - 1 : end].double()
            handle.remove()
            logs.append(logits.log_softmax(-1))
            nlls[len(logs) - 1].append(-logs[-1][range(end + 1 - start), ids[start : end + 1]])
        kls.append((logs[1].exp() * (logs[1] - logs[0])).sum(1))
        same.append(logs[0].argmax(1) == logs[1].argmax(1))
        kinds = torch.full_like(ids, KINDS.index("text"))
        kinds[start:], kinds[ids == tiny_vlms.IMAGE] = KINDS.index("answer"), KINDS.index("vision")
        ours, theirs = (s.reshape(len(ids), -1).double() for s in seen)
        each = (ours - theirs).square().sum(1) / theirs.square().sum(1)
        for kind, values in errors.items():
            values.append(float(each[kinds == KINDS.index(kind)].mean()))
    ours, theirs = (torch.cat(n) for n in nlls)
    assert found["tokens"] == len(ours)
    assert found["perplexity"] == pytest.approx(math.exp(ours.mean()), rel=1e-4)
    assert found["baseline_perplexity"] == pytest.approx(math.exp(theirs.mean()), rel=1e-4)
    assert found["change_percent"] == pytest.approx(100 * (math.exp(ours.mean() - theirs.mean()) - 1), rel=1e-3)
    assert found["kl"]["mean"] == pytest.approx(float(torch.cat(kls).mean()), rel=1e-3)
    assert found["kl"]["p99"] == pytest.approx(float(torch.cat(kls).max()), rel=1e-3)  # of fewer than 100 tokens
    assert found["same_top1"] == pytest.approx(float(torch.cat(same).double().mean()))
    assert {k: e["mean"] for k, e in found["errors"].items()} == {
        k: pytest.approx(sum(v) / len(v), rel=1e-3) for k, v in errors.items()
    }
    for entry in (found["kl"], *found["errors"].values()):
        assert 0 < entry["ci"][0] < entry["mean"] < entry["ci"][1]
    change = found["accuracy"]
    assert change["change"] == pytest.approx(change["percent"] - change["baseline_percent"])
    itself = evaluate_image_text(original, processor, "drawn", COUNT, original)
    assert itself["kl"]["mean"] == 0 and itself["same_top1"] == 1 and itself["accuracy"]["change_ci"] == [0, 0]


@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_rows_of_one_shape_are_one_batch(tmp_path, family):
    """Every architecture: a batch says what its rows say one at a time."""
    model = load(tiny_vlms.make(family, tmp_path / family), dtype=torch.float32)
    rows = [tiny_vlms.inputs(family, model, seed) for seed in range(3)]
    for row in rows:
        del row["attention_mask"]
    length = rows[0]["input_ids"].shape[1]
    places = [slice(length - 3 - n, length - n) for n in range(3)]
    with torch.inference_mode():
        batch, hidden = likelihoods(model, {k: torch.cat([r[k] for r in rows]) for k in rows[0]}, places)
        for n, row in enumerate(rows):
            (alone,), state = likelihoods(model, row, [places[n]])
            plain = model(**row).logits[0, places[n].start - 1 : places[n].stop - 1].log_softmax(-1)
            assert torch.allclose(alone, plain, atol=1e-4) and torch.allclose(batch[n], plain, atol=1e-4)
            assert torch.allclose(hidden[n], state[0], atol=1e-4)
    assert hidden.shape == (3, length, 64)


class Page(HTMLParser):
    """The addresses and the tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.sources = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href")]


def test_eval_with_a_page(run, taught, packed, tmp_path):
    """Two pictures of the user's own, questions that are markup: what is generated stands on the page, differences first."""
    for name in "ab":
        Image.new("RGB", (500, 40), "red" if name == "a" else "blue").save(tmp_path / f"{name}.png")
    asked = [("a.png", "<script>What?", "red"), (["a.png", "b.png"], "Which?", "blue"), ("b.png", "How?", "so")]
    lines = [{"image": i, "question": q, "answer": a, "kind": "$one"} for i, q, a in asked]
    del lines[2]["kind"]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = (
        "--image-text",
        tmp_path / "mine.jsonl",
        "--json",
        tmp_path / "e.json",
        "--report",
        tmp_path / "page.html",
    )
    code, said, err = run("eval", packed, "--baseline", taught, *common)
    assert code == 0, err
    figures = json.loads((tmp_path / "e.json").read_text())["pairs"]["mine"]
    for words in ("exactly right answers, mine", "$one", "vision tokens", "KL p99"):
        assert words in said
    assert figures["questions"] == 3 and figures["kinds"]["$one"]["questions"] == 2
    model, original, processor = both(taught, packed)
    pairs = list(held_out_image_text(tmp_path / "mine.jsonl", 9))
    for e in figures["examples"]:
        given = encode(pairs[e["index"]], processor, False)
        for m, answer in ((model, e["said"]), (original, e["baseline_said"])):
            made = m.generate(**given, max_new_tokens=20, do_sample=False)[0, given["input_ids"].shape[1] :]
            full = processor.tokenizer.decode(made, skip_special_tokens=True).strip()
            assert full.startswith(answer)
    differ = [e["said"] != e["baseline_said"] for e in figures["examples"]]
    assert differ == sorted(differ, reverse=True) and len(differ) == 3
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and "&lt;script&gt;What?" in text
    assert page.sources and all(s.startswith("data:image/png;base64,") for s in page.sources)
    assert len(page.sources) == 1 + 4  # a figure, and four pictures
    code, said, _ = run("eval", packed, *common)  # without the original
    assert code == 0 and "KL" not in said and "taught" not in (tmp_path / "page.html").read_text()
    assert run("eval", packed, "--text", taught / "chat_template.jinja", "--window", 8)[0] == 0  # texts are as before


def test_the_task_of_lm_eval(run, taught, packed, tiny, tmp_path, no_network):
    """What lm-eval finds in generated answers is what one forward pass says; beside a task of text."""
    pytest.importorskip("lm_eval.models.hf_vlms")
    options = ("--tasks", "qkit_scenes,qkit_cloze", "--limit", COUNT, "--json", tmp_path / "e.json")
    code, _, err = run("eval", packed, "--baseline", taught, "--image-text", "drawn", "--questions", COUNT, *options)
    assert code == 0, err
    found = json.loads((tmp_path / "e.json").read_text())
    right, said = found["pairs"]["drawn"]["accuracy"], found["tasks"]["qkit_scenes"]["metrics"]["exact_match"]
    assert found["tasks"]["qkit_scenes"]["samples"] == COUNT and "acc" in found["tasks"]["qkit_cloze"]["metrics"]
    assert 100 * said["value"] == pytest.approx(right["percent"])
    assert 100 * said["change"] == pytest.approx(right["change"])
    code, _, err = run("eval", tiny("llama"), "--tasks", "qkit_scenes", "--limit", 2)
    assert code == 2 and "tasks with images are for a vision-language model" in err


def test_check(run, taught, packed, tmp_path):
    (tmp_path / "budget.yaml").write_text(
        "accuracy: 1\naccuracy.color: '<=100'\nanswer_perplexity: +900%\nanswer_kl.mean: 0\naccuracy.smell: 0\nquestions: 24\n"
    )
    arguments = ("check", packed, "--budget", tmp_path / "budget.yaml", "--json", tmp_path / "c.json")
    code, _, err = run(*arguments, "--baseline", taught)
    assert code == 4 and "answer_kl.mean, accuracy.smell" in err
    found = json.loads((tmp_path / "c.json").read_text())
    assert [c["ok"] for c in found["checks"]] == [True, True, True, False, False]
    assert found["checks"][0]["measured"] == found["pairs"]["drawn"]["accuracy"]["percent"]
    assert found["pairs"]["drawn"]["questions"] == 24 and "texts" not in found


def test_refused(run, taught, packed, tiny, tmp_path):
    """One sentence for each, before anything is measured."""
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "bad.jsonl").write_text('{"image": "bad.png", "question": "What?", "answer": "A"}\n')
    for code, words, *arguments in (
        (
            2,
            "are for a vision-language model, and this is a llama: measure texts",
            tiny("llama"),
            "--image-text",
            "drawn",
        ),
        (2, "add --image-text drawn", packed, "--questions", 3),
        (2, "--report is for texts", packed, "--kv", "int8", "--report", tmp_path / "page.html"),
        (3, "no such file or folder: use 'drawn'", packed, "--image-text", tmp_path / "none"),
        (3, "the file is empty", packed, "--image-text", tmp_path / "empty.jsonl"),
        (3, "line 1: the image", packed, "--image-text", tmp_path / "bad.jsonl"),
        (
            2,
            "the baseline is a llama with a vocabulary of 4096",
            packed,
            "--image-text",
            "drawn",
            "--baseline",
            tiny("llama"),
        ),
    ):
        found, _, err = run("eval", *arguments)
        assert found == code and words in err and len(err.strip().splitlines()) == 1, err
    assert not re.search("page", " ".join(p.name for p in tmp_path.iterdir()))
