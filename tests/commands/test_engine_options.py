"""What --engine and --python make qkit say before it reads a file: a wrong interpreter, a file that is not for the engine."""

import sys

import pytest

pytest.importorskip("gguf", reason="the gguf package is not installed: pip install 'qkit[gguf]'")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of packed weights and one with a GGUF file, both of which say nothing true."""
    made = {}
    for kind, name in (("packed", "model.safetensors"), ("gguf", "model.gguf")):
        folder = tmp_path_factory.mktemp(kind)
        (folder / name).write_bytes(b"not read")
        (folder / "qkit.json").write_text("{}")
        made[kind] = folder
    return made


@pytest.mark.parametrize("verb", ["verify", "eval"])
def test_a_wrong_interpreter_is_found_before_the_files_are_read(verb, folders, run, tmp_path):
    for kind, engine in (("packed", "vllm"), ("packed", "transformers"), ("gguf", "llama.cpp")):
        code, _, err = run(verb, folders[kind], "--engine", engine, "--python", tmp_path / "none")
        assert code == 2 and "cannot be run: No such file" in err
    program = tmp_path / "program"
    program.write_text(f"#!{sys.executable}\nprint('another program')\n")
    program.chmod(0o755)
    code, _, err = run(verb, folders["packed"], "--engine", "vllm", "--python", program)
    assert code == 2 and "not an interpreter that runs vLLM: 'another program'" in err


@pytest.mark.parametrize("verb", ["verify", "eval"])
@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_a_gguf_file_is_for_llama_cpp(verb, engine, folders, run):
    for path in (folders["gguf"], folders["gguf"] / "model.gguf"):
        code, _, err = run(verb, path, "--engine", engine, "--python", sys.executable)
        assert code == 2 and f"--engine {engine}:" in err and "is a GGUF file: use --engine llama.cpp" in err


@pytest.mark.parametrize("verb", ["verify", "eval"])
def test_packed_weights_are_not_for_llama_cpp(verb, folders, run):
    code, _, err = run(verb, folders["packed"], "--engine", "llama.cpp", "--python", sys.executable)
    assert code == 2 and "is no GGUF file and has no model.gguf" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kv", "int8"], "--kv does not go with --engine"),
        (["--baseline", "tiny-llama"], "--baseline does not go with --engine"),
        (["--tasks", "vbench:flicker"], "--tasks vbench: does not go with --engine"),
        (["--tasks", "qkit_cloze", "--allow-task-code"], "--allow-task-code needs --task-dir"),
    ],
    ids=["kv", "baseline", "vbench", "task code"],
)
def test_what_an_engine_does_not_measure(options, words, folders, run):
    code, _, err = run("eval", folders["packed"], "--engine", "vllm", "--python", sys.executable, *options)
    assert code == 2 and words in err
