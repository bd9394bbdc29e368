"""Point 4: what lies beside the weights travels, is read before the work, and is part of the identity of a job."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Quiet, Stops
from tiny_dits import make_pipeline

from qkit.errors import BadCheckpoint, JobConflict
from qkit.files.checkpoint import Checkpoint
from qkit.files.safefile import save_tensors
from qkit.files.side_files import hash_side_files
from qkit.planning.request import Request
from qkit.workflows.quantize import prepare, quantize

TRAVELS = {
    "LICENSE": "as is",
    "NOTICE": "x",
    "README.md": "# A model",
    "USE_POLICY (1).md": "be good",
    "tokenizer.model.v3": "\x00pieces",
    "modules.json": '[{"idx": 1, "path": "1_Pooling", "type": "Pooling"}, {"idx": 2, "path": "2_Dense", "type": "Dense"}]',
    "config_sentence_transformers.json": '{"prompts": {}}',
    "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
    "2_Dense/config.json": '{"in_features": 4}',
    "additional_chat_templates/tools.jinja": "{{ messages }}",
    "chat_template.jinja": "{{ messages }}",
    "original/params.json": "{}",
    "trainer_state.json": '{"best_metric": NaN, "log_history": []}',
}
STAYS = (
    *("modeling_x.py", "lib.so", "run.sh", "optimizer.pt", "consolidated.00.pth", "model.gguf", "flax_model.msgpack"),
    *("tf_model.h5", "onnx/model.onnx", "rust_model.ot", "more.zip", "old.tar.gz", ".gitattributes", ".git/config"),
    *(".cache/huggingface/x.json", "__pycache__/a.txt", "MODEL.BIN", "pytorch_model.bin.index.json"),
)


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    """A model with everything beside its weights."""
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama", num_hidden_layers=1), folder)
    for name, text in {**TRAVELS, **dict.fromkeys(STAYS, "x")}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    save_tensors(folder / "2_Dense" / "model.safetensors", {"linear.weight": torch.zeros(4, 4)})
    return folder


def request_for(model: Path, **more) -> Request:
    return Request(model=str(model), scheme="w4a16", group_size=32, threads=1, **more)


def test_everything_travels_but_weights_code_and_pickles(model, tmp_path, run):
    code, _, err = run("quantize", "--model", model, "--scheme", "w4a16", "--group-size", 32, "--out", tmp_path / "out")
    assert code == 0, err
    there = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    own = {"config.json", "qkit.json", "recipe.yaml", "model.safetensors", "generation_config.json"}
    assert there == {*own, *TRAVELS, "tokenizer.json", "tokenizer_config.json", "2_Dense/model.safetensors"}
    assert (model / "README.md").read_bytes() in (tmp_path / "out" / "README.md").read_bytes()
    for name in there - {"config.json", "qkit.json", "recipe.yaml", "model.safetensors", "README.md"}:
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    assert run("verify", tmp_path / "out")[0] == 0
    record = json.loads((tmp_path / "out" / "qkit.json").read_text())
    assert set(record["files"]) == there - {"qkit.json"}


@pytest.mark.parametrize("name", ["generation_config.json", "1_Pooling/config.json", "tokenizer.json", "x.json"])
@pytest.mark.parametrize("text", ["", "{", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000, "\udc80"])
def test_json_that_cannot_be_read_is_refused_before_the_work(model, tmp_path, name, text):
    (model / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadCheckpoint, match=name):
        prepare(request_for(model))
    with pytest.raises(BadCheckpoint, match=name):
        quantize(request_for(model), tmp_path / "out", Quiet())
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_keys_that_choose_code_are_left_out(model, tmp_path):
    evil = {
        "generation_config.json": {"custom_generate": "evil", "max_length": 5, "trust_remote_code": True},
        "tokenizer_config.json": {
            "auto_map": {"AutoTokenizer": "evil.Evil"},
            "added_tokens_decoder": {"0": {"lstrip": True}},
        },
        "1_Pooling/config.json": {"deep": [{"auto_map": 1, "kept": 2}]},
    }
    for name, data in evil.items():
        (model / name).write_text(json.dumps(data))
    (model / "vocab.json").write_text('{"kernels": 7, "auto_map": 8}')  # tokens may be called anything
    quantize(request_for(model), tmp_path / "out", Quiet())
    made = {name: json.loads((tmp_path / "out" / name).read_text()) for name in (*evil, "vocab.json")}
    assert made == {
        "generation_config.json": {"max_length": 5},
        "tokenizer_config.json": {"added_tokens_decoder": {"0": {"lstrip": True}}},
        "1_Pooling/config.json": {"deep": [{"kept": 2}]},
        "vocab.json": {"kernels": 7, "auto_map": 8},
    }


def test_what_stays_behind_is_said(model, tmp_path, run):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "auto_map": {"a": "b"}}))
    (model / "generation_config.json").write_text('{"custom_generate": "x", "\\u001b_attn_implementation": 1}')
    code, said, _ = run("plan", "--model", model, "--scheme", "w4a16", "--group-size", 32)
    assert code == 0 and "not copied: MODEL.BIN and 12 more: code, pickles" in said
    assert "left out of config.json: auto_map: these keys select code to run" in said
    assert "left out of generation_config.json: custom_generate, \\x1b_attn_implementation:" in said


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "1_Pooling/config.json"])
@pytest.mark.parametrize("text", ["[]", "null", '"x"', "7"])
def test_settings_that_are_no_object_are_refused(model, name, text):
    (model / name).write_text(text)
    with pytest.raises(BadCheckpoint, match=f"{name}: found .*, expected a JSON object"):
        prepare(request_for(model))


class Meddles(Quiet):
    """Does something to the model when a phase begins."""

    def __init__(self, act) -> None:
        self.act = act

    def start(self, what: str, total: int) -> None:
        self.act()


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "1_Pooling/config.json", "2_Dense/model.safetensors"])
@pytest.mark.parametrize("deed", ["deleted", "changed"])
def test_a_file_that_changes_during_the_run_is_an_error(model, tmp_path, name, deed):
    def act():
        if deed == "deleted":
            (model / name).unlink(missing_ok=True)
        else:
            (model / name).write_bytes((model / name).read_bytes()[:-1] + b" ")

    with pytest.raises(BadCheckpoint, match=f"{name}.* was {deed} while the model was being quantized"):
        quantize(request_for(model), tmp_path / "out", Meddles(act))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "LICENSE"])
@pytest.mark.parametrize("deed", ["deleted", "changed", "added"])
def test_a_resume_with_another_side_file_is_a_conflict(model, tmp_path, name, deed):
    request = request_for(model)
    with pytest.raises(KeyboardInterrupt):
        quantize(request, tmp_path / "out", Stops(1))
    if deed == "deleted":
        (model / name).unlink()
    elif deed == "changed":
        (model / name).write_text(json.dumps({"model_max_length": 7}))
    else:
        name = "more.txt"
        (model / name).write_text("x")
    with pytest.raises(JobConflict, match=f"side_files.{name}"):
        quantize(request, tmp_path / "out", Quiet())
    assert not (tmp_path / "out").exists()


def test_what_may_not_travel_is_refused(model, tmp_path):
    def refused(part: str) -> None:
        with pytest.raises(BadCheckpoint, match=part):
            _ = Checkpoint.open(model).side_files

    (model / "notes.txt").symlink_to("/etc/hostname")
    refused("notes.txt: leads out of the model folder")
    (model / "notes.txt").unlink()
    (model / "docs").symlink_to(tmp_path)
    refused("docs: found a link to a folder")
    (model / "docs").unlink()
    os.mkfifo(model / "pipe")
    refused("pipe: found a folder or a device, expected a regular file")
    (model / "pipe").unlink()
    (model / "a\x1b[31m.txt").write_text("x")
    refused("cannot be printed")
    (model / "a\x1b[31m.txt").unlink()
    (model / "2_Dense" / "model.safetensors").rename(model / "2_Dense" / "pytorch_model.bin")
    refused("2_Dense: only 'pytorch_model.bin'")


def test_limits(model, monkeypatch):
    monkeypatch.setattr("qkit.files.side_files.MOST_FILES", 5)
    with pytest.raises(BadCheckpoint, match="files beside the weights, expected at most 5"):
        hash_side_files(model)
    monkeypatch.setattr("qkit.files.side_files.MOST_FILES", 100)
    monkeypatch.setattr("qkit.files.side_files.MOST_BYTES", 100)
    with pytest.raises(BadCheckpoint, match=r"\.json: \d+ bytes, expected at most 100"):
        hash_side_files(model)
    monkeypatch.setattr("qkit.files.side_files.MOST_TOGETHER", 1000)
    with pytest.raises(BadCheckpoint, match="bytes of files beside the weights, expected at most 1000"):
        hash_side_files(model)
    deep = model / "/".join("abcdefghijkl")
    deep.mkdir(parents=True)
    monkeypatch.undo()
    with pytest.raises(BadCheckpoint, match="folders deep"):
        hash_side_files(model)


def test_a_snapshot_of_a_cache_travels(model, tmp_path):
    """Files of a Hugging Face cache are links to its blobs."""
    repository = tmp_path / "models--me--it"
    snapshot = repository / "snapshots" / ("a" * 40)
    (repository / "blobs").mkdir(parents=True)
    for number, name in enumerate(str(p.relative_to(model)) for p in model.rglob("*") if p.is_file()):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(model / name, repository / "blobs" / str(number))
        (snapshot / name).symlink_to(os.path.relpath(repository / "blobs" / str(number), (snapshot / name).parent))
    assert Checkpoint.open(snapshot).side_files == Checkpoint.open(model).side_files


def test_room_for_what_travels_is_asked_for(model, tmp_path, run):
    (model / "large.txt").write_bytes(b"x" * 1_000_000)
    run("plan", "--model", model, "--scheme", "w4a16", "--group-size", 32, "--json", tmp_path / "plan.json")
    side = sum((model / name).stat().st_size for name in Checkpoint.open(model).side_files)
    assert json.loads((tmp_path / "plan.json").read_text())["forecast"]["copied_bytes"] == side > 1_000_000


def test_pipelines(tmp_path):
    source = make_pipeline(tmp_path / "pipe")
    around = [p for p in source.rglob("*") if p.is_file() and p.parent.name != "transformer"]
    copied = prepare(Request(model=str(source), scheme="w8a8", threads=1)).forecast.copied_bytes
    assert copied == sum(p.stat().st_size for p in around)
    (source / "LICENSE").write_text("as is")
    (source / "assets").mkdir()
    (source / "assets" / "a.png").write_bytes(b"\x89PNG")
    (source / "vae" / "evil.py").write_text("x")
    (source / "loose.safetensors").write_text("x")
    config = json.loads((source / "vae" / "config.json").read_text())
    (source / "vae" / "config.json").write_text(json.dumps({**config, "auto_map": {"a": "b"}}))
    request = Request(model=str(source), scheme="w8a8", threads=1)
    quantize(request, tmp_path / "out", Quiet())
    there = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {"LICENSE", "assets/a.png", "sampling.json", "transformer/qkit.json"} <= there
    assert not {"vae/evil.py", "loose.safetensors"} & there
    assert json.loads((tmp_path / "out" / "vae" / "config.json").read_text()) == config
    file = source / "scheduler" / "scheduler_config.json"
    with pytest.raises(BadCheckpoint, match=r"scheduler_config\.json: this file was deleted"):
        quantize(request, tmp_path / "again", Meddles(lambda: file.unlink(missing_ok=True)))
    assert not (tmp_path / "again").exists()
    file.write_text("{")
    with pytest.raises(BadCheckpoint, match=r"scheduler_config\.json"):
        prepare(request)
