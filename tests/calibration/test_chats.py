"""Chats as tokens: by the model's own template, BOS once, the answers marked; rows packed and padded."""

import json

import pytest
import qkit_data
import torch
from chats import TEMPLATE, rows_of, said, turns, write_lines

from qkit.calibration.batches import batches, extent, sample, single_rows
from qkit.calibration.chats import Chats
from qkit.calibration.records import Record
from qkit.errors import BadCalibration, UsageError
from qkit.runtime.loading import load_tokenizer

QWEN_LIKE = (
    "{% for m in messages %}{% set said = m['content'] %}"
    "{% if m['role'] == 'assistant' and not loop.last and '</think>' in said %}"
    "{% set said = said.split('</think>')[-1] %}{% endif %}"
    "{{ '<' + m['role'] + '>' + said + '</turn>' }}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
TODAY = "{{ strftime_now('%d %b %Y') + strftime_now('%Y-%m-%d') }}" + TEMPLATE
PARTS = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"


@pytest.fixture
def tokenizer():
    loaded = load_tokenizer(qkit_data.model_path("tiny-llama"))
    loaded.chat_template = TEMPLATE
    return loaded


def chat(*messages, where="f, line 1") -> Record:
    return Record(where, "messages", messages=tuple(messages))


def answered(tokenizer, *messages) -> str:
    """The text of the tokens that are marked as answers."""
    (tokens,) = Chats(tokenizer).tokens([chat(*messages)], True)
    return tokenizer.decode([i for i, mark in zip(tokens.ids, tokens.answers, strict=True) if mark])


@pytest.mark.parametrize("adds", [False, True], ids=["tokenizer adds none", "tokenizer adds it"])
@pytest.mark.parametrize("writes", [0, 1, 2])
def test_bos_is_there_once(tokenizer, adds, writes):
    """Whether the template writes it, the tokenizer adds it, or both; and not at all where neither has it."""
    bos = tokenizer.bos_token_id
    tokenizer.chat_template = "{{ bos_token }}" * writes + "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    if adds:
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, bos)]
        )
    written, text = Chats(tokenizer).tokens([chat(*turns(1)), Record("f", "text", "A text.")], False)
    assert written.ids.count(bos) == int(adds or writes > 0) and text.ids.count(bos) == int(adds)
    (marked,) = Chats(tokenizer).tokens([chat(*turns(1))], True)
    assert marked.ids == written.ids and len(marked.answers) == len(marked.ids)
    assert tokenizer.decode([i for i, m in zip(marked.ids, marked.answers, strict=True) if m]) == turns(1)[1]["content"]


def test_the_answers_and_the_token_that_ends_them(tokenizer):
    two = [*turns(1), *turns(5)]
    expected = "".join(m["content"] + tokenizer.eos_token for m in two if m["role"] == "assistant")
    assert answered(tokenizer, *two) == expected
    short = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "user"}]  # stands in the template, too
    assert answered(tokenizer, *short) == "user" + tokenizer.eos_token


def test_a_template_that_shortens_earlier_answers(tokenizer):
    tokenizer.chat_template = QWEN_LIKE
    first = {"role": "assistant", "content": "long thoughts</think>Yes."}
    assert answered(tokenizer, turns(1)[0], first, turns(3)[0], turns(3)[1]) == "Yes." + turns(3)[1]["content"]


def test_a_system_turn_that_the_template_does_not_take(tokenizer):
    tokenizer.chat_template = NO_SYSTEM
    (tokens,) = Chats(tokenizer).tokens([chat({"role": "system", "content": "Be short."}, *turns(1))], False)
    assert "user:\nBe short.\n\nWhat about" in tokenizer.decode(tokens.ids)


def test_content_in_parts(tokenizer):
    tokenizer.chat_template = PARTS
    (tokens,) = Chats(tokenizer).tokens([chat(*turns(1))], False)
    assert tokenizer.decode(tokens.ids) == "".join(m["content"] for m in turns(1))


def test_the_date_of_today_is_in_no_row(tokenizer):
    """Else a job that was stopped could not go on tomorrow."""
    tokenizer.chat_template = TODAY
    (tokens,) = Chats(tokenizer).tokens([chat(*turns(1))], False)
    assert tokenizer.decode(tokens.ids).startswith("26 Jul 20242024-07-26")


@pytest.mark.parametrize(
    "template, complaint",
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            "f, line 1: the chat template of the model refuses this chat: roles",
        ),
        ("nothing", "f, line 1: the chat template of the model leaves a turn out"),
        (
            "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}",
            "needs more than|refuses this chat",
        ),
    ],
)
def test_templates_that_fail(tokenizer, template, complaint):
    tokenizer.chat_template = template
    with pytest.raises(BadCalibration, match=complaint):
        Chats(tokenizer).tokens([chat(*turns(1))], False)


def test_without_a_template_the_turns_are_plain_text(tokenizer):
    tokenizer.chat_template = None
    (tokens,) = Chats(tokenizer).tokens([chat(*turns(1))], True)
    assert tokenizer.decode(tokens.ids) == "\n\n".join(m["content"] for m in turns(1))
    assert answered(tokenizer, *turns(1)).strip() == turns(1)[1]["content"]


# ---- rows --------------------------------------------------------------------------------------------------------


@pytest.fixture
def lines(tmp_path):
    return write_lines(tmp_path / "chat.jsonl", [{"messages": turns(i)} for i in range(60)])


def test_packed_rows_have_all_tokens(tokenizer, lines):
    rows = rows_of(lines, tokenizer, 8, 32)
    texts = [tokenizer.apply_chat_template(turns(i), tokenize=False) for i in range(60)]
    ids = [i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert rows.tokens.flatten().tolist() == ids[: 8 * 32] and rows.mask is None
    (understood,) = rows.understood
    assert understood["tokens"] == 256 and understood["total"] == 60 and len(understood["template"]) == 64
    assert 0 < understood["cut_off"] < 0.2
    assert rows.summary[0].startswith(
        f"chat.jsonl: 8 samples, 256 tokens, from {understood['records']} of 60 records (messages)"
    )


def test_padded_rows_hold_one_chat_each(tokenizer, lines):
    rows, short = rows_of(lines, tokenizer, 8, 256, padded=True), rows_of(lines, tokenizer, 8, 16, padded=True)
    for number in range(8):
        text = tokenizer.apply_chat_template(turns(number), tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert rows.tokens[number][rows.mask[number]].tolist() == ids
        assert short.tokens[number].tolist() == ids[:16]
    assert short.mask is None and short.understood[0]["cut_off"] > 0.5 and "cut_off" not in rows.understood[0]
    assert rows.digest != short.digest and rows.row_kinds.tolist() == rows.mask.int().tolist()


def test_answers_only(tokenizer, lines):
    everything, answers = (rows_of(lines, tokenizer, 8, 64, padded=True, answers_only=a) for a in (False, True))
    assert torch.equal(everything.tokens, answers.tokens) and everything.digest != answers.digest
    for number in range(8):
        assert (
            tokenizer.decode(answers.tokens[number][answers.mask[number]])
            == turns(number)[1]["content"] + tokenizer.eos_token
        )
    assert answers.understood[0]["counted"] == int(answers.mask.sum()) < answers.understood[0]["tokens"]
    text = write_lines(lines.parent / "t.jsonl", [{"text": said(1)}])
    with pytest.raises(BadCalibration, match="line 1: a text has no answers: leave --answers-only out"):
        rows_of(text, tokenizer, 1, 8, answers_only=True)
    unanswered = write_lines(lines.parent / "u.jsonl", [{"messages": turns(1)[:1]}])
    with pytest.raises(BadCalibration, match="no record in it has a token that counts"):
        rows_of(unanswered, tokenizer, 1, 8, answers_only=True)


def test_several_sources_take_turns(tokenizer, lines, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("\n".join(said(i) for i in range(100, 400)))
    table = tmp_path / "t.csv"
    table.write_text("id,said\n" + "".join(f"{i},{said(i + 1000)}\n" for i in range(90)))
    mixed = rows_of([f"{lines}:2", text, f"{table}:said"], tokenizer, 12, 32)
    alone = [rows_of(given, tokenizer, count, 32) for given, count in ((lines, 6), (text, 3), (f"{table}:said", 3))]
    assert [u["rows"] for u in mixed.understood] == [6, 3, 3] and mixed.source == "chat.jsonl + t.txt + t.csv"
    assert {tuple(r) for r in mixed.tokens.tolist()} == {tuple(r) for a in alone for r in a.tokens.tolist()}
    first = {tuple(r) for r in mixed.first(4).tokens.tolist()}
    assert len(first & {tuple(r) for r in alone[0].tokens.tolist()}) == 2  # a beginning has each in its share


def test_a_source_that_would_give_nothing(tokenizer, lines):
    with pytest.raises(UsageError, match=r"--samples 3: chat.jsonl would give none of them by its weight"):
        rows_of([f"{lines}:0.01", f"{lines}:5"], tokenizer, 3, 8)


@pytest.mark.parametrize("padded", [False, True])
def test_too_few_records(tokenizer, lines, padded):
    with pytest.raises(
        BadCalibration, match=r"chat.jsonl: 60 records with .* are .* samples of 64 tokens, 500 are needed"
    ):
        rows_of(lines, tokenizer, 500, 64, padded=padded)
    lines.write_text("\n\n")
    with pytest.raises(BadCalibration, match=r"chat.jsonl: there is no record in it"):
        rows_of(lines, tokenizer, 1, 8)


def test_losses_look_at_tokens_that_count(tokenizer, lines):
    rows = rows_of(lines, tokenizer, 8, 96, padded=True, answers_only=True)
    wanted = torch.cat([ids[1:][mask[1:]] for ids, mask in zip(rows.tokens, rows.mask, strict=True)])
    pieces = batches(rows, 200)
    assert torch.equal(torch.cat([b.targets[0] for b in pieces]), wanted)
    assert torch.equal(torch.cat([b.targets[0] for b in single_rows(rows)]), wanted)
    assert extent(rows).scored == len(wanted) == int(rows.mask.sum())
    logits = torch.arange(2 * 96 * 3, dtype=torch.float32).view(2, 96, 3)
    assert torch.equal(pieces[0].scored(logits)[0], logits[:, :-1][rows.mask[:2, 1:]])
    assert all(not bool(b.ids[0, -1] == tokenizer.pad_token_id) or b.mask[0, -1] for b in single_rows(rows))
    places = sample(rows, 50).places
    assert len(places) == 50 and bool(rows.mask.flatten()[places].all())


def test_the_embedded_chats_are_sound(tokenizer):
    """Every one is a chat of user and assistant in turn, and they come in several languages."""
    records = [json.loads(line) for line in qkit_data.chats_path().read_text(encoding="utf-8").splitlines()]
    for record in records:
        roles = [m["role"] for m in record["messages"] if m["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and len(record) == 1
    everything = "".join(m["content"] for r in records for m in r["messages"])
    assert all(
        any(a <= c <= b for c in everything)
        for a, b in ("\u4e00\u9fff", "\u0400\u04ff", "\u0600\u06ff", "\u3040\u30ff")
    )
    assert "```python" in everything and "```sql" in everything
