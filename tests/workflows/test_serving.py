"""The command line of an engine, from what the files say."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from qkit.workflows.serving import serve_command


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """``results(*options)``: a packed tiny-llama, made once for the same options."""
    from qkit.commands import main

    made: dict[tuple, Path] = {}

    def get(*options: str) -> Path:
        if options not in made:
            out = tmp_path_factory.mktemp("served") / "out"
            main(["quantize", "--model", "tiny-llama", "--method", "rtn", "--out", str(out), *options])
            made[options] = out
        return made[options]

    return get


def test_vllm_with_an_fp8_cache(results, run):
    out = results("--scheme", "w4a16", "--kv", "fp8", "--samples", "8", "--seqlen", "32")
    code, said, err = run("serve-command", out, "--tp", 2)
    assert code == 0
    wanted = f"vllm serve {out} --max-model-len 1024 --kv-cache-dtype fp8 --tensor-parallel-size 2"
    assert said.splitlines()[-1] == wanted
    assert "the group size has to divide the input columns of every tensor-parallel rank" in err


def test_vllm_with_a_plain_cache_and_a_shorter_context(results):
    assert serve_command(results("--scheme", "w8a8"), context=256).command.endswith("out --max-model-len 256")


def test_names_that_a_shell_would_split(results, tmp_path):
    out = shutil.copytree(results("--scheme", "w8a8"), tmp_path / "my model")
    assert serve_command(out).command.startswith(f"vllm serve '{out}' --max-model-len")


def test_llama_cpp(tmp_path, run):
    # A sound header without keys and tensors: what is damaged is refused.
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    said = f"llama-server --model {tmp_path / 'model.gguf'} --ctx-size "
    assert run("serve-command", tmp_path)[:2] == (0, said + "0\n")
    assert run("serve-command", tmp_path / "model.gguf", "--context", 99)[:2] == (0, said + "99\n")
    assert run("serve-command", tmp_path, "--tp", 2)[0] == 2


def test_llama_cpp_has_no_more_positions_than_the_file_says(tmp_path, run):
    def text(value: bytes) -> bytes:
        return len(value).to_bytes(8, "little") + value

    keys = text(b"general.architecture") + (8).to_bytes(4, "little") + text(b"llama")
    keys += text(b"llama.context_length") + (4).to_bytes(4, "little") + (1024).to_bytes(4, "little")
    (tmp_path / "model.gguf").write_bytes(
        b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (2).to_bytes(8, "little") + keys
    )
    assert run("serve-command", tmp_path, "--context", 1024)[0] == 0
    code, _, err = run("serve-command", tmp_path, "--context", 1025)
    assert code == 2 and "has 1024 positions: use at most so many" in err


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--tp", "3"], 2, "has 8 attention heads"),
        (["--context", "2000"], 2, "has 1024 positions"),
    ],
    ids=["heads", "positions"],
)
def test_what_the_model_does_not_allow(options, code, said, results, run):
    found, _, err = run("serve-command", results("--scheme", "w8a8"), *options)
    assert found == code and said in err


def test_a_file_that_vllm_does_not_load(results, run, tmp_path):
    out = results("--scheme", "w8a8", "--export", "qkit")
    code, said, err = run("serve-command", out)
    assert code == 3 and "vllm serve" not in said and "vLLM does not load it" in err


def test_a_folder_of_another_writer(results, tmp_path):
    out = shutil.copytree(results("--scheme", "w8a8"), tmp_path / "out")
    (out / "qkit.json").unlink()
    config = json.loads((out / "config.json").read_text())
    del config["max_position_embeddings"]
    (out / "config.json").write_text(json.dumps(config))
    assert (
        serve_command(out).command == f"vllm serve {out}"
        and "another tool wrote this file" in serve_command(out).notes[0]
    )
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    assert serve_command(out).notes == ()


def test_an_interpreter_starts_the_module(results, run, tmp_path):
    out, python = results("--scheme", "w8a8"), tmp_path / "python"
    python.write_text("""#!/bin/sh\necho '{"found": true}' > "$4"\n""")
    python.chmod(0o755)
    code, said, _ = run("serve-command", out, "--context", 256, "--python", python)
    assert code == 0
    wanted = f"{python} -m vllm.entrypoints.openai.api_server --model {out} --max-model-len 256"
    assert said.splitlines()[-1] == wanted
    assert run("serve-command", out, "--python", sys.executable)[0] == 2  # it has no vLLM
