"""Names whose beginning is not the model's: the plan, the bytes and the record's tensors are those of the plain names."""

from collections.abc import Callable
from pathlib import Path

import pytest
import quantized_sources as made
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import qkit
from qkit.errors import BadCheckpoint
from qkit.workflows.quantize import open_structure


def renamed(model: Path, folder: Path, rename: Callable[[str], str]) -> Path:
    tensors = load_file(model / "model.safetensors")
    save_file({rename(name): t for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    tiny_models.add_tokenizer(folder)
    return folder


RENAMES: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled blocks": lambda name: name.replace(".self_attn", "._orig_mod.self_attn"),
    "distributed": lambda name: f"module.{name}",
    "distributed and compiled": lambda name: f"module._orig_mod.{name}",
    "trained with peft": lambda name: f"base_model.model.{name}",
    "missing": lambda name: name.removeprefix("model."),
    "doubled": lambda name: f"model.{name}",
    "doubled in part": lambda name: name.replace("model.layers", "model.model.layers"),
}


@pytest.fixture(scope="module", params=["llama", "mixtral", "opt"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make(request.param, tmp_path_factory.mktemp(request.param) / "model")


@pytest.mark.parametrize("kind", RENAMES)
def test_prefixes(kind: str, model: Path, tmp_path: Path) -> None:
    expected = open_structure(str(model))
    found = open_structure(str(renamed(model, tmp_path, RENAMES[kind])))
    assert found.checkpoint.tensors.keys() == expected.checkpoint.tensors.keys()
    assert [x.name for b in found.blocks for x in b.linears] == [x.name for b in expected.blocks for x in b.linears]


def test_the_result_is_that_of_the_plain_names(tmp_path: Path) -> None:
    model = tiny_models.make("llama", tmp_path / "model")
    (tmp_path / "renamed").mkdir()
    source = renamed(model, tmp_path / "renamed", RENAMES["compiled"])
    for folder, name in ((model, "a"), (source, "b")):
        qkit.quantize(folder, out=tmp_path / name, scheme="w4a16", group_size=32)
    assert qkit.verify(tmp_path / "b").ok
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    qkit.load(source)


def test_a_compiled_model_that_is_quantized(tmp_path: Path) -> None:
    model = tiny_models.make("llama", tmp_path / "model")
    source, copy = made.fp8(model, tmp_path)
    (tmp_path / "renamed").mkdir()
    found = open_structure(str(renamed(source, tmp_path / "renamed", RENAMES["distributed and compiled"]))).checkpoint
    expected = open_structure(str(copy)).checkpoint
    assert all(torch.equal(found.read(name), expected.read(name)) for name in expected.tensors)


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    model = tiny_models.make("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["_orig_mod.lm_head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        BadCheckpoint, match=r"'_orig_mod\.lm_head\.weight' and .* are both 'lm_head\.weight' of the model"
    ):
        open_structure(str(model))
