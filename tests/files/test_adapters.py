"""An adapter (LoRA) given with --base is merged into the model as peft merges it, and a run cannot tell the two apart."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import quantized_sources as made
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import qkit
from qkit.errors import BadCheckpoint, Unsupported, UsageError
from qkit.files.checkpoint import Checkpoint

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("llama", tmp_path_factory.mktemp("base") / "model")


def adapter(
    base: Path, folder: Path, dtype: torch.dtype = torch.float32, **config: Any
) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter of two linears, the embeddings and, in whole, the last norm; and all merged weights by peft's formulas."""
    folder.mkdir(parents=True)
    g = torch.Generator().manual_seed(3)
    tensors, weights = dict[str, torch.Tensor](), load_file(base / "model.safetensors")
    merged = dict(weights)
    rank = config.get("r", 4)
    scaling = config.get("lora_alpha", 8) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    for module in (Q, DOWN, "model.embed_tokens"):
        weight, table = weights[f"{module}.weight"], "embed" in module
        out, columns = weight.T.shape if table else weight.shape
        down, up = (torch.randn(shape, generator=g).mul(0.3).to(dtype) for shape in ((rank, columns), (out, rank)))
        name = f"base_model.model.{module}.lora_" + ("embedding_{}" if table else "{}.weight")
        tensors |= {name.format("A"): down, name.format("B"): up}
        delta = (up.float() @ down.float()) * (config.get("alpha_pattern", {}).get(module[-6:], scaling * rank) / rank)
        merged[f"{module}.weight"] = weight + (delta.T if table else delta).to(weight.dtype)
    merged["model.norm.weight"] = torch.rand(64, generator=g).bfloat16()
    tensors["base_model.model.model.norm.weight"] = merged["model.norm.weight"].float()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    stated = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "base_model_name_or_path": "owner/base", **config}
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    return folder, merged


@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True, "lora_alpha": 16}, {"r": 7}, {"alpha_pattern": {"q_proj": 2}}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_merge_and_unload(
    dtype: torch.dtype, config: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    folder, merged = adapter(base, tmp_path / "adapter", dtype, **config)
    checkpoint = Checkpoint.open(base, adapter=folder)
    assert checkpoint.tensors.keys() == merged.keys()
    for name, expected in merged.items():
        found = checkpoint.read(name)
        assert found.dtype == expected.dtype and torch.equal(found, expected), name


def merged_copy(base: Path, merged: dict[str, torch.Tensor], folder: Path) -> Path:
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in merged.items()}, folder / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((base / name).read_bytes())
    return folder


def test_the_result_is_that_of_the_merged_model(base: Path, tmp_path: Path) -> None:
    folder, merged = adapter(base, tmp_path / "adapter")
    copy = merged_copy(base, merged, tmp_path / "merged")
    options = {"scheme": "w4a16", "method": "gptq", "group_size": 32, "samples": 4, "seqlen": 32}
    qkit.quantize(folder, base=str(base), out=tmp_path / "a", **options)
    qkit.quantize(copy, out=tmp_path / "b", **options)
    assert qkit.verify(tmp_path / "a").ok
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    source = json.loads((tmp_path / "a" / "qkit.json").read_text())["source"]
    assert len(source["adapter"]) == 64 and source["sha256"] == Checkpoint.open(base, adapter=folder).sha256()
    assert source["sha256"] != Checkpoint.open(base).sha256()


def test_an_adapter_of_a_quantized_model(base: Path, tmp_path: Path) -> None:
    """QLoRA: the base is decoded first."""
    source, copy = made.fp8(base, tmp_path / "fp8")
    folder, _ = adapter(base, tmp_path / "adapter")
    found, expected = Checkpoint.open(source, adapter=folder), Checkpoint.open(copy, adapter=folder)
    assert all(torch.equal(found.read(name), expected.read(name)) for name in expected.tensors)
    assert found.fingerprint() != expected.fingerprint()


def test_what_an_adapter_needs_is_said(base: Path, tmp_path: Path) -> None:
    folder, _ = adapter(base, tmp_path / "adapter")
    with pytest.raises(Unsupported, match=r"this is an adapter .*with --base of"):
        qkit.plan(folder, scheme="w4a16")
    with pytest.raises(UsageError, match=r"it is for an adapter .*leave it out"):
        qkit.plan(base, scheme="w4a16", base=str(base))
    other = tiny_models.make("llama", tmp_path / "other", intermediate_size=128)
    with pytest.raises(
        BadCheckpoint, match=r"does not fit '.*down_proj.weight' .*trained on \('owner/base'\) as --base"
    ):
        qkit.plan(folder, scheme="w4a16", base=str(other))
    opt = tiny_models.make("opt", tmp_path / "opt")
    with pytest.raises(BadCheckpoint, match=r"the adapter changes .*, and .* has no such tensor"):
        qkit.plan(folder, scheme="w4a16", base=str(opt))


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"peft_type": "IA3"}, Unsupported, "peft_type is 'IA3', and qkit merges LORA alone"),
        ({"use_dora": True}, Unsupported, "use_dora is True, and qkit merges plain LoRA alone"),
        ({"target_parameters": ["x"]}, Unsupported, "target_parameters is"),
        ({"alpha_pattern": {".*q_proj": 3}}, Unsupported, "is a regular expression"),
        ({"lora_alpha": "8"}, BadCheckpoint, "lora_alpha is '8', expected a number"),
    ],
)
def test_adapters_that_are_not_merged(
    config: dict[str, Any], error: type[Exception], message: str, base: Path, tmp_path: Path
) -> None:
    folder, _ = adapter(base, tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    with pytest.raises(error, match=message):
        Checkpoint.open(base, adapter=folder)


def test_damaged_adapters(base: Path, tmp_path: Path) -> None:
    folder, _ = adapter(base, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    half = {name: t for name, t in tensors.items() if "down_proj.lora_B" not in name}
    save_file(half, folder / "adapter_model.safetensors")
    with pytest.raises(BadCheckpoint, match="has lora_A alone, expected lora_A and lora_B"):
        Checkpoint.open(base, adapter=folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(BadCheckpoint, match=r"no adapter_model.safetensors"):
        Checkpoint.open(base, adapter=folder)
