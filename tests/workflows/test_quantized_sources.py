"""A model that is quantized already gives, byte for byte, the result of its decoded copy."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import quantized_sources as made
import tiny_models
import torch
import transformers

import qkit
from qkit.errors import Unsupported
from qkit.files.checkpoint import Checkpoint
from qkit.system.progress import Silent
from qkit.workflows.convert import convert

ROWS = {"samples": 4, "seqlen": 32}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("llama", tmp_path_factory.mktemp("plain") / "model")


def result(model: Path, out: Path, **options: Any) -> dict[str, str]:
    """{file: sha256} of all that a run wrote, but for what names its source or has its size: record, recipe and card."""
    qkit.quantize(model, out=out, **{"scheme": "w4a16", "group_size": 32, **options})
    assert qkit.verify(out).ok
    return {
        str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(out.rglob("*"))
        if file.is_file() and file.name not in ("qkit.json", "recipe.yaml", "README.md")
    }


def record(out: Path) -> dict[str, Any]:
    """The record, without card and recipe."""
    found = json.loads((out / "qkit.json").read_text())
    del found["files"]["README.md"], found["files"]["recipe.yaml"]
    return found


@pytest.mark.parametrize(("method", "shards"), [("gptq", 1), ("rtn", 2), ("awq", 1)])
def test_fp8_in_blocks(method: str, shards: int, plain: Path, tmp_path: Path) -> None:
    source, copy = made.fp8(plain, tmp_path, shards=shards)
    rows = {} if method == "rtn" else ROWS
    found = result(source, tmp_path / "a", method=method, **rows)
    assert found == result(copy, tmp_path / "b", method=method, **rows)
    assert found == result(source, tmp_path / "again", method=method, **rows)
    first, second = record(tmp_path / "a"), record(tmp_path / "b")
    assert {k for k in first if first[k] != second[k]} == {"source", "plan_hash", "sum"}
    assert first["source"]["sha256"] == Checkpoint.open(source).sha256() != second["source"]["sha256"]


def by_transformers(source: Path, folder: Path) -> Path:
    """The copy that transformers decodes and saves, with its own reader and writer."""
    transformers.AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder)
    tiny_models.add_tokenizer(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_copy_that_transformers_saves(family: str, tmp_path: Path) -> None:
    plain = tiny_models.make(family, tmp_path / "plain")
    source, _ = made.fp8(plain, tmp_path, shards=2)
    copy = by_transformers(source, tmp_path / "saved")
    found, expected = (result(model, tmp_path / f"{model.name}.out") for model in (source, copy))
    assert (
        found["model.safetensors"] == expected["model.safetensors"] and found["config.json"] == expected["config.json"]
    )


def test_mxfp4_of_gpt_oss(tmp_path: Path) -> None:
    """Experts of a layer in one tensor, transposed, with biases."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 4096}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = transformers.GptOssConfig(**sizes, **heads, max_position_embeddings=128)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "plain")
    tiny_models.add_tokenizer(tmp_path / "plain")
    source, copy = made.mxfp4(tmp_path / "plain", tmp_path, shards=2)
    saved = by_transformers(source, tmp_path / "saved")
    found, expected = Checkpoint.open(source), Checkpoint.open(saved)
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.read(name), expected.read(name)) for name in expected.tensors)
    with pytest.raises(Unsupported, match="cannot keep it as the source stores it: the source stores it in one tensor"):
        qkit.plan(source, scheme="w8a16", keep_source=["*.experts.*"])
    with pytest.raises(
        Unsupported, match=r"experts\S*: it cannot be converted .*qkit quantize --model \S+ --scheme w4a16"
    ):
        convert(str(source), "compressed-tensors", tmp_path / "converted", Silent())
    qkit.quantize(source, scheme="w4a16", out=tmp_path / "anew")
    assert qkit.verify(tmp_path / "anew").ok
    assert result(source, tmp_path / "a", method="gptq", **ROWS) == result(copy, tmp_path / "b", method="gptq", **ROWS)


SOURCES = {
    "gptq": lambda plain, out: made.gptq(plain, out, act_order=True, shards=2),
    "awq": lambda plain, out: made.awq(plain, out, shards=2),
    "int8": lambda plain, out: made.compressed(
        plain, out, {"type": "int", "num_bits": 8, "strategy": "channel", "symmetric": True}, "int-quantized", 2
    ),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_other_ways_of_storing(kind: str, plain: Path, tmp_path: Path) -> None:
    source, copy = SOURCES[kind](plain, tmp_path)
    assert result(source, tmp_path / "a", scheme="w8a16") == result(copy, tmp_path / "b", scheme="w8a16")


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "w8a16"},
        {"scheme": "nvfp4a16", "group_size": None},
        {"scheme": "mxfp8", "group_size": None},
        {"scheme": "w3a16", "outliers": 1.0, "rank": 4},
        {"scheme": "w4a16", "method": "smoothquant", **ROWS},
    ],
    ids=str,
)
def test_a_result_of_qkit_is_a_source(options: dict[str, Any], plain: Path, tmp_path: Path) -> None:
    result(plain, tmp_path / "first", **options)
    loaded = qkit.load(tmp_path / "first", dtype=torch.float32).state_dict()
    checkpoint = Checkpoint.open(tmp_path / "first")
    assert "quantization_config" not in checkpoint.config
    assert checkpoint.tensors.keys() == Checkpoint.open(plain).tensors.keys()
    for name in (n for n in checkpoint.tensors if n in loaded):  # what is not quantized
        assert torch.equal(checkpoint.read(name).float(), loaded[name].float()), name
    result(tmp_path / "first", tmp_path / "second", scheme="w8a16")


def test_logits_of_a_result_as_a_source(plain: Path, tmp_path: Path) -> None:
    """The plain view of a result computes what its packed weights do."""
    result(plain, tmp_path / "packed", scheme="w3a16", outliers=1.0, rank=4)
    checkpoint = Checkpoint.open(tmp_path / "packed")
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    model.load_state_dict({n: checkpoint.read(n).float() for n in checkpoint.tensors}, strict=False)
    tokens = tiny_models.tokens()
    packed = tiny_models.logits(qkit.load(tmp_path / "packed", dtype=torch.float32), tokens)
    assert tiny_models.relative(tiny_models.logits(model, tokens), packed) < 0.02  # plain weights are bfloat16


def test_a_quantized_source_can_be_loaded_and_measured(plain: Path, tmp_path: Path) -> None:
    source, copy = made.fp8(plain, tmp_path)
    tokens = tiny_models.tokens()
    assert torch.equal(tiny_models.logits(qkit.load(source), tokens), tiny_models.logits(qkit.load(copy), tokens))
