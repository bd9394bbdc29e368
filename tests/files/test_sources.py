"""Sources that are quantized already: what is read is, bit for bit, what the library that stores them so decodes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantized_sources as made
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from qkit.errors import BadCheckpoint, QkitError, Unsupported
from qkit.files.checkpoint import Checkpoint

INT = {"type": "int", "strategy": "group", "group_size": 32}
FLOAT = {"type": "float", "num_bits": 8, "symmetric": True}
FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    "int4": ({**INT, "num_bits": 4, "symmetric": True}, "pack-quantized"),
    "int4 asymmetric": ({**INT, "num_bits": 4, "symmetric": False}, "pack-quantized"),
    "int3": ({**INT, "num_bits": 3, "symmetric": True}, "pack-quantized"),
    "int8 channel": ({"type": "int", "num_bits": 8, "strategy": "channel", "symmetric": True}, "int-quantized"),
    "fp8 channel": ({**FLOAT, "strategy": "channel"}, "float-quantized"),
    "fp8 tensor": ({**FLOAT, "strategy": "tensor"}, "float-quantized"),
    "nvfp4": (
        {
            "type": "float",
            "num_bits": 4,
            "strategy": "tensor_group",
            "group_size": 16,
            "symmetric": True,
            "scale_dtype": torch.float8_e4m3fn,
        },
        "nvfp4-pack-quantized",
    ),
    "mxfp4": (
        {
            "type": "float",
            "num_bits": 4,
            "strategy": "group",
            "group_size": 32,
            "symmetric": True,
            "scale_dtype": torch.uint8,
        },
        "mxfp4-pack-quantized",
    ),
}
SOURCES: dict[str, Callable[[Path, Path, int], tuple[Path, Path]]] = {
    "fp8 in blocks": lambda plain, out, n: made.fp8(plain, out, shards=n),
    "fp8 in oblong blocks": lambda plain, out, n: made.fp8(plain, out, (16, 32), shards=n),
    "fp8, powers of two": lambda plain, out, n: made.fp8(plain, out, shards=n, scale_fmt="ue8m0"),
    "fp8, one scale": lambda plain, out, n: made.fp8(plain, out, None, n),
    "gptq": lambda plain, out, n: made.gptq(plain, out, shards=n),
    "gptq v2": lambda plain, out, n: made.gptq(plain, out, version="gptq_v2", shards=n),
    "gptq in the order of activations": lambda plain, out, n: made.gptq(plain, out, act_order=True, shards=n),
    "gptq with 2 bits": lambda plain, out, n: made.gptq(plain, out, 2, shards=n),
    "gptq with 3 bits": lambda plain, out, n: made.gptq(plain, out, 3, shards=n),
    "gptq with 8 bits": lambda plain, out, n: made.gptq(plain, out, 8, shards=n),
    "awq": lambda plain, out, n: made.awq(plain, out, shards=n),
    **{k: (lambda plain, out, n, f=f: made.compressed(plain, out, *f, shards=n)) for k, f in FORMATS.items()},  # type: ignore[misc]
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("llama", tmp_path_factory.mktemp("plain") / "model")


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", SOURCES)
def test_every_tensor_is_that_of_the_decoded_copy(kind: str, shards: int, plain: Path, tmp_path: Path) -> None:
    source, copy = SOURCES[kind](plain, tmp_path, shards)
    found, expected = Checkpoint.open(source), Checkpoint.open(copy)
    assert found.config == expected.config and "quantization_config" not in found.config
    assert found.tensors.keys() == expected.tensors.keys()
    for name, info in expected.tensors.items():
        here = found.tensors[name]
        assert (here.dtype, here.shape, here.nbytes) == (info.dtype, info.shape, info.nbytes)
        value = found.read(name)
        assert value.dtype == info.torch_dtype and torch.equal(value, expected.read(name)), name
    assert found.nbytes == sum(t.numel() * t.itemsize for f in found.shards for t in load_file(f).values())


def test_the_codes_of_a_source_are_in_its_fingerprint(plain: Path, tmp_path: Path) -> None:
    source, _ = made.fp8(plain, tmp_path)
    before = Checkpoint.open(source).fingerprint(), Checkpoint.open(source).sha256()
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight_scale_inv"] *= 2
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert Checkpoint.open(source).sha256() != before[1] and Checkpoint.open(source).fingerprint() != before[0]


# ---- FP8 ---------------------------------------------------------------------------------------------------------


def fp8_of(
    shape: tuple[int, ...], grid: tuple[int, ...], folder: Path, block: Any = (32, 32), name: str = "x.weight"
) -> Path:
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 126, shape, generator=g).to(torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.rand(grid, generator=g) + 0.1
    scale_name = name.replace("weight", "weight_scale_inv") if "weight" in name else f"{name}_scale_inv"
    return folder_of({name: codes, scale_name: scales}, {"quant_method": "fp8", "weight_block_size": block}, folder)


def folder_of(
    tensors: dict[str, torch.Tensor], quantization: dict[str, Any] | None, folder: Path, **config: Any
) -> Path:
    save_file(tensors, folder / "model.safetensors")
    stated = {"dtype": "bfloat16", **config, **({"quantization_config": quantization} if quantization else {})}
    (folder / "config.json").write_text(json.dumps(stated))
    return folder


def test_the_last_block_may_be_cut_off(tmp_path: Path) -> None:
    """576 rows of DeepSeek's latent projection in blocks of 128: here 80 rows in blocks of 32."""
    folder = fp8_of((80, 70), (3, 3), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    scale = tensors["x.weight_scale_inv"].repeat_interleave(32, 0).repeat_interleave(32, 1)[:80, :70]
    expected = (tensors["x.weight"].float() * scale).to(torch.bfloat16)
    assert torch.equal(Checkpoint.open(folder).read("x.weight"), expected)


def test_fused_experts_in_fp8(tmp_path: Path) -> None:
    folder = fp8_of((3, 64, 32), (3, 2, 1), tmp_path, name="experts.gate_up_proj")
    tensors = load_file(folder / "model.safetensors")
    scale = tensors["experts.gate_up_proj_scale_inv"].repeat_interleave(32, 1).repeat_interleave(32, 2)
    expected = (tensors["experts.gate_up_proj"].float() * scale).to(torch.bfloat16)
    assert torch.equal(Checkpoint.open(folder).read("experts.gate_up_proj"), expected)


def test_large_weights_are_decoded_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fp8_of((96, 64), (3, 2), tmp_path)
    whole = Checkpoint.open(folder).read("x.weight")
    monkeypatch.setattr("qkit.files.sources.decoded.CHUNK", 64 * 7)
    assert torch.equal(Checkpoint.open(folder).read("x.weight"), whole)


# ---- MXFP4 -------------------------------------------------------------------------------------------------------


def test_mxfp4_is_what_transformers_decodes(tmp_path: Path) -> None:
    """All 256 bytes under all exponents but the largest, which a byte of blocks times it does not fit in bfloat16."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, 250, 1, 1).contiguous()
    scales = torch.arange(250, dtype=torch.uint8).reshape(1, 250, 1).repeat(2, 1, 16).contiguous()
    tensors = {"m.experts.gate_up_proj_blocks": blocks, "m.experts.gate_up_proj_scales": scales}
    folder = folder_of(
        {**tensors, "m.experts.gate_up_proj_bias": torch.ones(2, 250)}, {"quant_method": "mxfp4"}, tmp_path
    )
    checkpoint = Checkpoint.open(folder)
    assert sorted(checkpoint.tensors) == ["m.experts.gate_up_proj", "m.experts.gate_up_proj_bias"]
    found = checkpoint.read("m.experts.gate_up_proj")
    assert checkpoint.tensors["m.experts.gate_up_proj"].shape == found.shape == (2, 512, 250)
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales))


# ---- what the config says, and what is malformed -----------------------------------------------------------------


def test_a_source_without_a_config_tells_by_its_tensors(plain: Path, tmp_path: Path) -> None:
    source, copy = made.fp8(plain, tmp_path)
    (source / "config.json").write_bytes((copy / "config.json").read_bytes())
    found, expected = read_all(source), read_all(copy)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("maker", "name"), [("gptq", "quantize_config.json"), ("awq", "quant_config.json")])
def test_older_tools_wrote_a_file_beside(maker: str, name: str, plain: Path, tmp_path: Path) -> None:
    source, copy = getattr(made, maker)(plain, tmp_path)
    config = json.loads((source / "config.json").read_text())
    quantization = config.pop("quantization_config")
    del quantization["quant_method"]
    if maker == "awq":
        quantization = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    (source / "config.json").write_text(json.dumps(config))
    (source / name).write_text(json.dumps(quantization))
    found, expected = read_all(source), read_all(copy)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def broken(source: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source


LAYER = "model.layers.0.self_attn.q_proj"


def without(leaf: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda t: t.pop(f"{LAYER}.{leaf}")


def cut(leaf: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda t: t.update({f"{LAYER}.{leaf}": t[f"{LAYER}.{leaf}"][..., :-1].contiguous()})


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("fp8 in blocks", without("weight_scale_inv"), "q_proj.weight' is F8_E4M3, and no file has its scale"),
        ("fp8 in blocks", without("weight"), "weight_scale_inv' .* belongs to a quantized weight that is not there"),
        ("fp8 in blocks", cut("weight_scale_inv"), "has shape .*, and no grid of blocks of 32x32 over a weight"),
        ("gptq", without("scales"), "has no tensor '.*q_proj.scales' in any file"),
        ("gptq", without("qzeros"), "has no tensor '.*q_proj.qzeros' in any file"),
        ("gptq", cut("scales"), r"is F16 .*, expected floats \[groups, 64\]"),
        ("gptq", cut("qzeros"), r"q_proj.qzeros' is I32 .*, expected I32 \[2, 8\]"),
        ("gptq", cut("g_idx"), r"q_proj.g_idx' is I32 \[63\], expected I32 \[64\]"),
        ("awq", without("qzeros"), "has no tensor '.*q_proj.qzeros' in any file"),
        ("awq", cut("qzeros"), "expected I32"),
        ("awq", cut("scales"), "expected floats"),
        ("int4", without("weight_packed"), "has no tensor '.*q_proj.weight' in any file"),
        ("int4", without("weight_shape"), "has no tensor '.*q_proj.weight_shape' in any file"),
        ("int4", without("weight_scale"), "q_proj.weight_packed' .* belongs to a quantized weight"),
        ("int4", cut("weight_scale"), "config.json implies"),
        ("nvfp4", without("weight_global_scale"), "has no tensor '.*weight_global_scale' in any file"),
    ],
)
def test_one_sentence_for_what_is_malformed(
    kind: str, change: Callable[[dict[str, torch.Tensor]], object], message: str, plain: Path, tmp_path: Path
) -> None:
    source = broken(SOURCES[kind](plain, tmp_path, 1)[0], change)
    with pytest.raises(BadCheckpoint, match=message) as caught:
        Checkpoint.open(source)
    assert str(caught.value).isprintable() and "get the model again" in str(caught.value)


def test_groups_of_columns_that_are_not_there(plain: Path, tmp_path: Path) -> None:
    source, _ = made.gptq(plain, tmp_path)
    checkpoint = Checkpoint.open(broken(source, lambda t: t[f"{LAYER}.g_idx"].fill_(9)))
    with pytest.raises(BadCheckpoint, match=r"q_proj.weight', GPTQ with 4 bits: g_idx names groups 9 to 9 of 2: get"):
        checkpoint.read(f"{LAYER}.weight")


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quantized by 'bitsandbytes', and qkit decodes fp8, .*dequantize it first"),
        ({"bits": 4}, "quantized by unknown method"),
        ({"quant_method": ["gptq"]}, r"quantized by \['gptq'\], and qkit decodes"),
        ({"quant_method": "gptq"}, "bits is None, expected a whole number"),
        ({"quant_method": "gptq", "bits": 5}, "bits is 5, expected one of 2, 3, 4, 8"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        (
            {"quant_method": "gptq", "bits": 4, "dynamic": {"x": {"bits": 6}}},
            r"bits is 6, expected one of 2, 3, 4, 8 .*'x'",
        ),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"(": {}}}, r"'\(' is no pattern of layers"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": ["x"]}, "the rules for single layers are no object of objects"),
        (
            {"quant_method": "auto-round", "packing_format": "auto_round:marlin"},
            "packing_format is 'auto_round:marlin'",
        ),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "AWQ of version 'gemv'"),
        ({"quant_method": "compressed-tensors", "config_groups": 3}, "config_groups is 3"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config.format is 'sparse-24-bitmask'",
        ),
    ],
)
def test_ways_of_storing_that_qkit_does_not_decode(quantization: Any, message: str, tmp_path: Path) -> None:
    tensors = {"x.qweight": torch.zeros(4, 8, dtype=torch.int32)}
    with pytest.raises(Unsupported, match=message) as caught:
        Checkpoint.open(folder_of(tensors, quantization, tmp_path))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("blocks", "scales", "message"),
    [
        ((2, 8, 2, 16), None, "has no scales 'x_scales' in any file"),
        ((2, 8, 2, 16), (2, 8, 3), r"x_scales' is U8 \[2, 8, 3\], expected U8 \[2, 8, 2\]"),
        ((2, 8, 2, 15), (2, 8, 2), r"expected \[experts, rows, groups, 16\]"),
        ((8, 2, 16), (8, 2), r"expected \[experts, rows, groups, 16\]"),
    ],
)
def test_mxfp4_that_does_not_fit(blocks: Any, scales: Any, message: str, tmp_path: Path) -> None:
    tensors = {"x_blocks": torch.zeros(blocks, dtype=torch.uint8)}
    if scales is not None:
        tensors["x_scales"] = torch.zeros(scales, dtype=torch.uint8)
    with pytest.raises(QkitError, match=message):
        Checkpoint.open(folder_of(tensors, {"quant_method": "mxfp4"}, tmp_path))
