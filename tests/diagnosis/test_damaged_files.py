"""Files that are cut, too long or overlap: the finding names the file, the bytes, and what to do."""

import json
import shutil
import struct

import pytest
from seeded_gguf import gguf_bytes, gguf_offset

from qkit.diagnosis.findings import FAULT, WARNING
from qkit.files.gguf import read_gguf
from qkit.workflows.doctor import diagnose

WEIGHTS = {"w4a16": "model.safetensors", "q4_k": "model.gguf"}


@pytest.fixture(params=WEIGHTS)
def copied(request, made, tmp_path):
    """A copy of a result, and its weight file."""
    folder = tmp_path / "copy"
    shutil.copytree(made(request.param), folder)
    return folder, folder / WEIGHTS[request.param]


def files(folder, level=FAULT):
    return [f for f in diagnose(folder).findings if f.kind == "files" and f.level == level]


@pytest.mark.parametrize("missing", [1, 1000])
def test_a_file_that_is_cut_short(missing, copied):
    folder, file = copied
    size = file.stat().st_size
    with file.open("r+b") as handle:
        handle.truncate(size - missing)
    (fault,) = files(folder)
    assert fault.layers == (file.name,) and f"has {size - missing} bytes, expected {size}" in fault.found
    assert "cut short" in fault.found and "download" in fault.advice


@pytest.mark.parametrize("left", [0, 4, 20, 200])
def test_a_header_that_is_cut_short(left, copied):
    folder, file = copied
    with file.open("r+b") as handle:
        handle.truncate(left)
    (fault,) = files(folder)
    assert fault.layers == (file.name,) and f"{left} bytes" in fault.found and "expected" in fault.found
    assert "Error" not in fault.found and "download" in fault.advice


def test_bytes_behind_the_last_tensor(copied):
    folder, file = copied
    size = file.stat().st_size
    with file.open("ab") as handle:
        handle.write(bytes(4096))
    (finding,) = files(folder, FAULT if file.suffix == ".safetensors" else WARNING)
    assert str(size + 4096) in finding.found and file.name in finding.layers


def test_a_few_bytes_of_padding_are_none(made, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made("q4_k"), copy)
    with (copy / "model.gguf").open("ab") as handle:
        handle.write(bytes(31))
    assert files(copy, WARNING) == []


def test_tensors_of_safetensors_that_overlap(made, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made("w4a16"), copy)
    file = copy / "model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    first, second = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])[:2]
    header[second]["data_offsets"] = [x - 8 for x in header[second]["data_offsets"]]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    (fault,) = files(copy)
    assert "overlaps" in fault.found and second in fault.found and first not in fault.found


def test_tensors_of_gguf_that_overlap(made, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made("q4_k"), copy)
    before = sorted(read_gguf(copy / "model.gguf").tensors, key=lambda t: t.begin)
    name = "blk.0.ffn_down.weight"
    at = next(i for i, t in enumerate(before) if t.name == name)
    gguf_offset(name, -32)(copy)
    (fault,) = [f for f in files(copy) if "within" in f.found]
    assert fault.layers == (before[at - 1].name, name)


def test_a_pointer_of_git_lfs(made, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made("w4a16"), copy)
    (copy / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in files(copy)[0].found


def test_not_a_gguf_file(made, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made("q4_k"), copy)
    gguf_bytes(0, b"GGML")(copy)
    assert files(copy)[0].layers == ("model.gguf",)
