"""What can be retrieved through a KV cache: how contexts are made, and that the figures are what they say."""

import json

import pytest
import qkit_data
import torch

from qkit.errors import BadInput, UsageError
from qkit.evaluation.retrieval import (
    CHOICES,
    DEPTHS,
    evaluate_retrieval,
    find_facts,
    lengths_of,
    needle_trial,
    recall_trial,
    score_trial,
    trials,
)
from qkit.evaluation.text import tokenize
from qkit.kvcache.policy import parse
from qkit.runtime.loading import load, load_tokenizer

LENGTH = 300


@pytest.fixture(scope="module")
def text():
    return qkit_data.text_path("evaluation").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny("llama"))


@pytest.fixture(scope="module")
def tokens(tokenizer, text):
    return tokenize(tokenizer, text)


@pytest.fixture(scope="module")
def model(tiny):
    return load(tiny("llama", max_position_embeddings=1024), dtype=torch.float32)


def chance() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_needle_is_where_the_depth_says(depth, tokenizer, text, tokens):
    known, window = find_facts(tokenizer, text, "needle"), tokens[:LENGTH]
    made = needle_trial(known, window, tokenizer.decode(window), depth, chance())
    (question,) = made.questions
    for twin, answer in zip(made.contexts, question.answers, strict=False):
        fact = torch.cat([question.tokens, answer, known.end])
        at = round(depth * (len(twin) - len(fact)))
        assert torch.equal(twin[at : at + len(fact)], fact)
        assert torch.equal(torch.cat([twin[:at], twin[at + len(fact) :]]), window[: len(twin) - len(fact)])
        assert len(twin) + len(question.tokens) + len(answer) == LENGTH
        assert tokenizer.decode(fact).startswith("\nThe secret word of the ")
    words = [tokenizer.decode(a).strip() for a in question.answers]
    assert len(set(words)) == CHOICES and not set(words) & set(tokenizer.decode(window).split())


def test_a_list_has_each_key_once_and_its_twin_differs_where_it_is_asked(tokenizer, text, tokens):
    made = recall_trial(find_facts(tokenizer, text, "recall"), tokens[:LENGTH], DEPTHS, chance())
    lists = [tokenizer.decode(c) for c in made.contexts]
    lines = [[line.split(": ") for line in told.splitlines() if ": " in line] for told in lists]
    keys = [line[0] for line in lines[0]]
    first = keys.index(tokenizer.decode(made.questions[0].tokens).strip(":\n"))
    keys, lines = keys[first:], [told[first:] for told in lines]  # what is before is text
    assert len(set(keys)) == len(keys) and keys == [line[0] for line in lines[1]]
    differ = [i for i, (a, b) in enumerate(zip(*lines, strict=True)) if a != b]
    assert differ == [round(d * (len(keys) - 1)) for d in DEPTHS]
    for i, question in zip(differ, made.questions, strict=True):
        assert tokenizer.decode(question.tokens) == f"\n{keys[i]}:"
        true = [tokenizer.decode(a).strip() for a in question.answers]
        assert true[:2] == [told[i][1] for told in lines]
        assert lists[0].count(f": {true[0]}\n") <= 1 and f": {true[1]}\n" not in lists[0]
        assert all(f": {wrong}\n" in lists[0] for wrong in true[2:])


@torch.inference_mode()
def test_the_likelihood_of_a_plain_cache_is_that_of_one_pass(model, tokenizer, text, tokens):
    for trial in trials(tokenizer, text, tokens[None, :LENGTH], [LENGTH]):
        found, (size, plain) = score_trial(model, trial, None)
        assert size == plain == 2 * 2 * 2 * 16 * 2 * trial.contexts.shape[1]  # layers, sides, heads, channels, 16 bits
        for question, (likely, greedy) in zip(trial.questions, found, strict=True):
            count, n = question.answers.shape
            for side in (0, 1):
                asked = torch.cat([trial.contexts[side], question.tokens]).expand(count, -1)
                rows = torch.cat([asked, question.answers], dim=1)
                assert rows.shape[1] == trial.length == LENGTH
                logits = model(rows, use_cache=False).logits[:, -n - 1 : -1]
                expected = logits.log_softmax(-1).gather(2, rows[:, -n:, None]).sum((1, 2))
                torch.testing.assert_close(likely[side].float(), expected, rtol=1e-4, atol=1e-3)
                assert torch.equal(greedy[side], (logits.argmax(-1) == rows[:, -n:]).all(1))


def test_what_is_greedy_is_what_decoding_gives(model, tokenizer, text, tokens):
    """An answer made of the greedy continuation is found to be one, and no other is."""
    known = find_facts(tokenizer, text, "needle")
    made = needle_trial(known, tokens[:LENGTH], "", 0.5, chance())
    (question,) = made.questions
    prompt = torch.cat([made.contexts[0], question.tokens])[None]
    ids = model.generate(
        prompt, max_new_tokens=question.answers.shape[1], do_sample=False, pad_token_id=0, eos_token_id=[]
    )
    question.answers[2] = ids[0, prompt.shape[1] :]
    ((_, greedy),), _ = score_trial(model, made, None)
    assert greedy[0].nonzero().flatten().tolist() == [2]


def test_rows_of_every_cache(model, tokenizer, text, tokens):
    policies = {name: parse(name) for name in ("pm-kvq:2", "int8", "xquant2")}
    found = evaluate_retrieval(model, tokenizer, text, tokens, 512, 2, policies)
    assert list(found) == ["none", *policies]
    for name, rows in found.items():
        places = [(task, n, d) for task in ("needle", "recall") for n in (256, 512) for d in DEPTHS]
        assert [(r["task"], r["length"], r["depth"]) for r in rows] == places
        assert all(r["asked"] == 4 and r["choices"] == CHOICES and 0 <= r["exact"] <= 1 for r in rows)
        assert all((r["best"] * 4) % 1 == 0 and r["gain_ci"][0] <= r["gain"] <= r["gain_ci"][1] for r in rows)
        assert all((r["share"] == 1) == (name == "none") and r["share"] <= 1 for r in rows)
    plain, near, far = ([r["nll"] for r in found[name]] for name in ("none", "int8", "pm-kvq:2"))
    assert plain == pytest.approx(near, abs=0.05) and plain != near
    assert max(abs(a - b) for a, b in zip(plain, far, strict=True)) > 0.05
    again = evaluate_retrieval(model, tokenizer, text, tokens, 512, 2, {"int8": policies["int8"]})
    assert again["none"] == found["none"] and again["int8"] == found["int8"]
    other = evaluate_retrieval(model, tokenizer, text, tokens, 512, 2, {}, seed=1)
    assert [r["nll"] for r in other["none"]] != plain


def test_lengths():
    assert lengths_of(2048) == [512, 1024, 2048] and lengths_of(512) == [256, 512] and lengths_of(100) == [100]


def test_what_cannot_be_asked(model, tokenizer, text, tokens):
    def run(text, tokens, window):
        evaluate_retrieval(model, tokenizer, text, tokens, window, 1, {})

    with pytest.raises(BadInput, match=r"context of 60 tokens is too short .* use a larger --window"):
        run(text, tokens, 60)
    with pytest.raises(BadInput, match=r"context of 9 tokens is too short"):
        run(text, tokens, 9)
    with pytest.raises(BadInput, match="words that can be asked for"):
        run("one two three " * 400, tokens, 256)
    short = text[:3000]
    with pytest.raises(BadInput, match="words that can be asked for"):
        run(short, tokenize(tokenizer, short), 600)
    with pytest.raises(UsageError, match="do not fit the model"):
        run(text, tokens, 2048)
    with pytest.raises(BadInput, match="one window needs 512"):
        run(text, tokens[:500], 512)


def test_the_command(run, tiny, tmp_path):
    folder, file = tiny("llama", max_position_embeddings=1024), tmp_path / "e.json"
    code, said, err = run(
        "eval", folder, "--kv", "kivi2", "--retrieval", "--window", 256, "--windows", 1, "--json", file
    )
    assert code == 0, err
    assert "retrieval from evaluation" in said and "best of 8 % (chance 12.5)" in said
    measured = json.loads(file.read_text())
    rows = measured["retrieval"]["evaluation"]
    assert list(rows) == ["none", "kivi2"] and "caches" not in measured
    assert [len(r) for r in rows.values()] == [2 * len(DEPTHS)] * 2
    code, _, err = run("eval", folder, "--retrieval", "--kv", "int8", "--prompt", 9)
    assert code == 2 and "which --retrieval replaces" in err and len(err.strip().splitlines()) == 1


def test_a_trained_model_knows_what_it_just_read(tokenizer, text, tokens):
    """The last thing before the question is likelier than it would be without it, through any cache: the reference model, which
    was trained on text, has the same tokenizer."""
    model = load("tiny-llama", dtype=torch.float32)
    found = evaluate_retrieval(model, tokenizer, text, tokens, 256, 2, {"int2": parse("int2")})
    assert list(found) == ["none", "int2"]
    for rows in found.values():
        last = [r["gain"] for r in rows if r["depth"] == 1.0]
        assert len(last) == 2 and min(last) > 0.02
