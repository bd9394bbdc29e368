"""Point 9, second half: calibration files that are no plain text are read as what they are, under any name, or refused with
what to do. Their syntax never gets into the rows."""

import gzip
import json

import pytest
import qkit_data

from qkit.calibration.mixture import Layout, mixed_rows
from qkit.calibration.sources import CalibSource
from qkit.errors import BadCalibration
from qkit.files.text_file import data_in
from qkit.runtime.loading import load_tokenizer

TEXT = qkit_data.text_path("calibration").read_text(encoding="utf-8")[:6000]
CHAT = [{"role": "user", "content": TEXT[:900]}, {"role": "assistant", "content": TEXT[900:2000]}]
ROWS = "".join(f"what is {i},it is {i} and no other number\n" for i in range(400))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(qkit_data.model_path("tiny-llama"))


@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl", ""])
@pytest.mark.parametrize(
    "content, form",
    [
        (json.dumps({"messages": CHAT}), "messages"),
        (json.dumps([{"conversations": [{"from": "human", "value": TEXT}]}] * 9, indent=1), "ShareGPT conversations"),
        ("\n".join(json.dumps({"messages": CHAT}) for _ in range(200)), "messages"),
        ("\n".join(json.dumps({"text": TEXT[:300]}) for _ in range(90)), "text"),
        (json.dumps([TEXT[i : i + 90] for i in range(0, 5000, 90)]), "text"),
        (json.dumps({"text": TEXT * 40}), "text"),
        ("\ufeff" + json.dumps({"text": TEXT}), "text"),
        ("question,answer\n" + ROWS, "question and answer"),
        ("id\ttext\n" + ROWS.replace(",", "\t"), "text"),
    ],
)
def test_json_chats_and_tables(tmp_path, tokenizer, suffix, content, form):
    file = tmp_path / f"calib{suffix}"
    file.write_text(content, encoding="utf-8")
    if suffix.startswith(".json") and content[0] not in "{[\ufeff":  # a table with the name of something else
        with pytest.raises(BadCalibration, match=r"calib.json.*not valid JSON"):
            mixed_rows([CalibSource(str(file))], tokenizer, Layout(samples=4, seqlen=32), 4096)
        return
    rows = mixed_rows([CalibSource(str(file))], tokenizer, Layout(samples=4, seqlen=32), 4096)
    (understood,) = rows.understood
    assert understood["form"] == form and understood["records"] >= 1
    said = tokenizer.decode(rows.tokens.flatten())
    assert "{" not in said and "messages" not in said


@pytest.mark.parametrize(
    "content, found",
    [
        (gzip.compress(TEXT.encode()), "packed by gzip"),
        (b"PK\x03\x04" + b"x" * 9000, "a ZIP archive"),
        (b"%PDF-1.7\n" + b"text " * 2000, "a PDF document"),
        (b"some text " * 900 + b"\0\1\2", "binary data"),
    ],
)
def test_binary_files(tmp_path, tokenizer, content, found):
    file = tmp_path / "calib.txt"
    file.write_bytes(content)
    with pytest.raises(BadCalibration, match=f"found {found}"):
        mixed_rows([CalibSource(str(file))], tokenizer, Layout(samples=4, seqlen=32), 4096)


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        "[1] Introduction\n\nThe first words, and more.\n" * 40,
        "[1]\nA footnote stands here, alone.\n",
        "{note} In braces begins a text, and goes on.\n" * 9,
        "Hello, world\n\nThis is a text, with commas, and more, here.\nAnd no table\n",
        "Dear Sir,\nthank you.\nYours,\nA. B.\n",
        '"Quoted," she said, and went on.\nThen he spoke, too.\n',
        "def f(a, b):\n    return [a, b]\n",
        "[Scene: a room]\nANNA: Where is it?\n",
        "Name, Place\n",
    ],
)
def test_prose_is_read(text):
    assert data_in(text) is None


def test_what_is_called_a_parquet_file_and_is_none(tmp_path, tokenizer):
    file = tmp_path / "calib.txt"
    file.write_bytes(b"PAR1" + bytes(range(256)) * 40)
    with pytest.raises(BadCalibration, match=r"calib.txt: no Parquet file that pyarrow can read"):
        mixed_rows([CalibSource(str(file))], tokenizer, Layout(samples=4, seqlen=32), 4096)


def test_a_chat_for_a_language_model(run, tiny, tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(json.dumps({"messages": CHAT}) for _ in range(9)))
    common = ("plan", "--scheme", "w4a16", "--method", "gptq", "--samples", 2, "--seqlen", 16)
    code, said, err = run(*common, "--calib", file, "--model", tiny("llama"))
    assert code == 0 and "calibration: chat.jsonl: 2 samples, 32 tokens, from 1 of 9 records (messages)" in said, err


def test_a_chat_for_a_model_with_pictures(run, vlm, tmp_path):
    """It is read as a text; a line with a picture and a turn is refused."""
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": CHAT}))
    common = (
        "plan",
        "--scheme",
        "w4a16",
        "--method",
        "gptq",
        "--samples",
        1,
        "--seqlen",
        16,
        "--target",
        "vision=skip",
    )
    common = (*common, "--target", "projector=skip")
    code, said, err = run(*common, "--calib", file, "--model", vlm("llava", processor=True))
    assert code == 0 and "(messages), by the chat template of the model" in said, err
