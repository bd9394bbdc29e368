"""Every form of record that people have, and the place of what is not understood."""

import json

import pytest
import qkit_data
from chats import rows_of, write_lines

from qkit.calibration.readers import records_of
from qkit.calibration.records import read_record
from qkit.calibration.sources import CalibSource, parse_source
from qkit.errors import BadCalibration, Unsupported
from qkit.runtime.loading import load_tokenizer

ASKED = ({"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."})
SYSTEM = {"role": "system", "content": "Be short."}
FORMS = {
    "messages": ({"messages": [*ASKED]}, "messages", ASKED),
    "with parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, ASKED[1]]},
        "messages",
        ASKED,
    ),
    "a list of turns": ([*ASKED], "messages", ASKED),
    "ShareGPT": (
        {
            "system": "Be short.",
            "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}],
        },
        "ShareGPT conversations",
        (SYSTEM, *ASKED),
    ),
    "prompt and completion": ({"prompt": "Why?", "completion": "Because."}, "prompt and completion", ASKED),
    "the same as turns": ({"prompt": [ASKED[0]], "completion": [ASKED[1]]}, "prompt and completion", ASKED),
    "question and answer": ({"question": "Why?", "answer": "Because."}, "question and answer", ASKED),
    "instruction": ({"instruction": "Why?", "input": "", "output": "Because."}, "instruction and output", ASKED),
    "with an input": (
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        "instruction and output",
        ({"role": "user", "content": "Add.\n\n1, 2"}, {"role": "assistant", "content": "3"}),
    ),
    "a preference": (
        {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
        "preference pairs, the chosen answer",
        ASKED,
    ),
    "whole chats": ({"chosen": [*ASKED], "rejected": [*ASKED]}, "preference pairs, the chosen answer", ASKED),
    "answers alone": ({"prompt": "Why?", "chosen": [ASKED[1]]}, "preference pairs, the chosen answer", ASKED),
    "two speakers": (
        {"chosen": "\n\nHuman: Why?\n\nAssistant: Because."},
        "preference pairs, the chosen answer",
        ASKED,
    ),
    "JSON in a field": ({"messages": json.dumps([*ASKED])}, "messages", ASKED),
    "chat before text": ({"text": "### rendered", "messages": [*ASKED]}, "messages", ASKED),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name):
    data, form, messages = FORMS[name]
    record = read_record(data, "f, line 1")
    assert (record.form, record.messages, record.text) == (form, messages, "")


def test_texts_and_named_columns():
    assert read_record({"text": "A text."}, "f").text == "A text." and read_record("A text.", "f").text == "A text."
    assert read_record({"text": "no", "body": "A text."}, "f", "body").text == "A text."
    assert read_record({"body": [*ASKED]}, "f", "body").messages == ASKED


@pytest.mark.parametrize(
    "data, complaint",
    [
        ({"content": "x"}, "expected messages, .* or text, found content: name the column to read"),
        ({"messages": []}, "messages has no turns"),
        ({"messages": "none"}, "messages is 'none', expected a list of turns"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "turn 1: role is 'narrator', expected user, assistant"),
        ({"messages": [ASKED[0], {"role": "assistant", "content": 3}]}, "turn 2: content is 3, expected a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "turn 1: a part of the content is 'image'"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "from is 'alien', expected human, gpt"),
        ({"prompt": "x"}, "a prompt without an answer"),
        ({"instruction": "x"}, "an instruction without output"),
        ({"text": 3}, "text is 3, expected a text"),
        (7, "expected an object with messages"),
        ({"text": "a \ud800 b"}, r"\\ud800 is one half of a character"),
        ({"prompt": "Why?", "completion": "\udfff"}, r"\\udfff is one half of a character"),
    ],
)
def test_what_is_not_understood_is_named(data, complaint):
    with pytest.raises(BadCalibration, match=f"^f, line 3.*{complaint}"):
        read_record(data, "f, line 3")


def test_the_last_line_of_a_file_is_looked_at_too(tmp_path):
    """Also where the first lines would be enough."""
    tokenizer = load_tokenizer(qkit_data.model_path("tiny-llama"))
    good = [{"text": f"Line {i} of a text with some words in it, all of them plain."} for i in range(200)]
    for bad, complaint in (('{"text": ', "line 201: not valid JSON"), ('{"txet": "x"}', "line 201: expected messages")):
        file = write_lines(tmp_path / "t.jsonl", good)
        with file.open("a") as f:
            f.write(bad)
        with pytest.raises(BadCalibration, match=f"t.jsonl, {complaint}"):
            rows_of(file, tokenizer, 2, 8)


# ---- tables and data sets ----------------------------------------------------------------------------------------

TABLE = 'id,body,output\n1,"A text, with\na line break",x\n2,Second,y\n'


def texts(source: CalibSource) -> list[str]:
    return [r.text for r in records_of(source).records]


def test_csv_with_a_named_column(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text(TABLE)
    assert texts(parse_source(f"{file}:body")) == ["A text, with\na line break", "Second"]
    tabs = tmp_path / "t.tsv"
    tabs.write_text("id\ttext\n1\tOne, two\n")
    assert texts(parse_source(tabs)) == ["One, two"]


@pytest.mark.parametrize(
    "column, content, complaint",
    [
        ("", TABLE, "t.csv, line 1: no column says what it is, found id, body, output.*--calib t.csv:COLUMN"),
        (":bdoy", TABLE, "t.csv, line 1: there is no column 'bdoy', found id, body, output"),
        (":body", TABLE + "3,too,many,fields\n", "t.csv, line 5: 4 fields, expected 3"),
        (":body", 'id,body\n1,"open\n', "t.csv, line .: no CSV"),
    ],
)
def test_a_table_that_is_not_understood(tmp_path, column, content, complaint):
    file = tmp_path / "t.csv"
    file.write_text(content)
    with pytest.raises(BadCalibration, match=complaint):
        texts(parse_source(f"{file}{column}"))


def test_parquet(tmp_path, monkeypatch):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "t.parquet"
    parquet.write_table(arrow.table({"body": ["One.", "Two.", "Three."], "messages": [[*ASKED]] * 3}), file)
    assert texts(parse_source(f"{file}:body")) == ["One.", "Two.", "Three."]
    chats = records_of(parse_source(file))
    assert chats.total == 3 and [r.messages for r in chats.records] == [ASKED] * 3
    with pytest.raises(BadCalibration, match="there is no column 'said', found body, messages"):
        records_of(parse_source(f"{file}:said"))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(Unsupported, match=r"t.parquet: a Parquet file needs pyarrow.*pip install 'qkit\[eval\]'"):
        records_of(parse_source(file))


def test_a_data_set(tmp_path, monkeypatch):
    """A local folder, read by the datasets package; one that cannot be reached is told in a sentence."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "d"
    folder.mkdir()
    write_lines(folder / "train.jsonl", [{"body": f"Row {i}."} for i in range(3)])
    source = parse_source(f"dataset:{folder}:::body")
    assert texts(source) == ["Row 0.", "Row 1.", "Row 2."]
    with pytest.raises(BadCalibration, match="there is no column 'said', found body"):
        records_of(parse_source(f"dataset:{folder}:::said"))

    def offline(*_args, **_options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        BadCalibration, match=r"dataset:a/b: cannot be loaded .*reach the Hub.*the network, or use a file"
    ):
        records_of(parse_source("dataset:a/b"))
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(Unsupported, match="dataset:a/b needs the datasets package"):
        records_of(parse_source("dataset:a/b"))
