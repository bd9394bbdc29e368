"""Point 16, B12: the commit of a model from the hub is recorded, and --require-revision wants one to be named."""

import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest

from qkit.files.folder import hub_source
from qkit.files.locate import UNWANTED, find_model

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40


@pytest.fixture
def hub(tiny, tmp_path, monkeypatch) -> Path:
    """A cache of the hub with two commits of one model, and no network."""
    root = tmp_path / "hub" / "models--me--tiny"
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    source = tiny("llama", num_hidden_layers=1)
    for commit in (COMMIT, OTHER):
        (root / "snapshots" / commit).mkdir(parents=True)
        for file in source.iterdir():
            shutil.copy(file, root / "blobs" / f"{commit[0]}-{file.name}")
            target = root / "snapshots" / commit / file.name
            target.symlink_to(os.path.relpath(root / "blobs" / f"{commit[0]}-{file.name}", target.parent))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return root


def quantized(run, out, *options) -> dict:
    code, _, err = run("quantize", "--scheme", "w4a16", "--group-size", 32, "--out", out, *options)
    assert code == 0, err
    assert run("verify", out)[0] == 0
    return json.loads((out / "qkit.json").read_text())["source"]


def test_the_commit_is_recorded(hub, tmp_path, run, no_network):
    source = quantized(run, tmp_path / "main", "--model", "me/tiny")
    assert (source["repository"], source["revision"]) == ("me/tiny", COMMIT)
    for revision, commit in ((OTHER, OTHER), ("main", COMMIT)):
        source = quantized(run, tmp_path / revision, "--model", "me/tiny", "--revision", revision, "--require-revision")
        assert (source["repository"], source["revision"]) == ("me/tiny", commit)


def test_of_a_folder_of_the_cache_too(hub, tmp_path, run):
    source = quantized(run, tmp_path / "out", "--model", hub / "snapshots" / OTHER)
    assert (source["repository"], source["revision"]) == ("me/tiny", OTHER)
    assert str(tmp_path) not in (tmp_path / "out" / "qkit.json").read_text()


def test_another_folder_has_none(tiny, tmp_path, run):
    source = quantized(run, tmp_path / "out", "--model", tiny("llama", num_hidden_layers=1), "--require-revision")
    assert not {"repository", "revision"} & set(source)
    assert hub_source(tmp_path / "snapshots" / "main") == {}


@pytest.mark.parametrize("verb", ["plan", "quantize"])
def test_a_hub_model_without_a_revision_is_refused(hub, tmp_path, run, verb):
    out = ["--out", tmp_path / "out"]
    code, _, err = run(verb, "--model", "me/tiny", "--scheme", "w4a16", "--require-revision", *out)
    assert code == 2 and "--require-revision: the hub model me/tiny" in err and "--revision COMMIT" in err
    assert not (tmp_path / "out").exists()


def test_a_revision_of_what_has_none_is_refused(tiny, run, tmp_path):
    for model in (tiny("llama", num_hidden_layers=1), "tiny-llama"):
        code, _, err = run("plan", "--model", model, "--scheme", "w4a16", "--revision", "main")
        assert code == 2 and "--revision main" in err and "leave it out" in err


def test_an_unknown_revision_is_one_sentence(hub, run):
    code, _, err = run("plan", "--model", "me/tiny", "--scheme", "w4a16", "--revision", "nowhere")
    assert code == 3 and "me/tiny at revision nowhere" in err and len(err.strip().splitlines()) == 1


def test_what_travels_is_fetched(monkeypatch, tmp_path):
    """All that goes with a model, and nothing of code, pickles and weights of other kinds."""
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **more: asked.update(more) or str(tmp_path))
    find_model("me/tiny", "v1")
    names = [
        "LICENSE",
        "README.md",
        "tokenizer.model.v3",
        "modules.json",
        "1_Pooling/config.json",
        "chat_template.jinja",
    ]
    names += ["additional_chat_templates/a.jinja", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    others = [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "a.py",
        "onnx/model.onnx",
        "x.gguf",
        ".gitattributes",
    ]
    fetched = huggingface_hub.utils.filter_repo_objects([*names, *others], ignore_patterns=asked["ignore_patterns"])
    assert list(fetched) == names and asked["revision"] == "v1" and asked["ignore_patterns"] == list(UNWANTED)
