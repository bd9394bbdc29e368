"""Files of ModelOpt and AutoRound, and GPTQ with rules for single layers: each weight is what the layout's formula says."""

import json
from pathlib import Path
from typing import Any

import pytest
import quantized_sources as made
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import qkit
from qkit.errors import BadCheckpoint, Unsupported
from qkit.files.checkpoint import Checkpoint
from qkit.nn.layers import QuantLinear
from qkit.system.progress import Silent
from qkit.workflows.convert import convert
from qkit.workflows.doctor import diagnose

GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("llama", tmp_path_factory.mktemp("plain") / "model")


def nvfp4(name: str, weight: torch.Tensor) -> tuple[made.Tensors, torch.Tensor]:
    """After ModelOpt's NVFP4QTensor: weight_scale_2 = amax / 2688, weight_scale = group amax / 6 / weight_scale_2."""
    stem, tiles = name.removesuffix("weight"), weight.float().unflatten(1, (-1, 16))
    second = weight.float().abs().amax() / 2688
    scale = (tiles.abs().amax(-1) / 6 / second).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    values = tiles / (scale.float() * second)[..., None]
    codes = (values.abs()[..., None] - GRID).abs().argmin(-1).to(torch.uint8) | (
        torch.signbit(values).to(torch.uint8) << 3
    )
    codes = codes.flatten(1)
    signed = torch.cat((GRID, -GRID))[codes.long()].unflatten(1, (-1, 16))
    decoded = (signed * scale.float()[..., None] * second).flatten(1)
    stored = {"weight": codes[:, 0::2] | codes[:, 1::2] << 4, "weight_scale": scale, "weight_scale_2": second}
    return {stem + leaf: t for leaf, t in (stored | {"input_scale": torch.tensor(0.01)}).items()}, decoded.to(
        weight.dtype
    )


def fp8(name: str, weight: torch.Tensor, channel: bool = False) -> tuple[made.Tensors, torch.Tensor]:
    stem = name.removesuffix("weight")
    scale = (weight.float().abs().amax(1) if channel else weight.float().abs().amax()) / 448
    wide = scale[:, None] if channel else scale
    codes = (weight.float() / wide).to(torch.float8_e4m3fn)
    inputs = {} if channel else {f"{stem}input_scale": torch.tensor(0.02)}
    return {f"{stem}weight": codes, f"{stem}weight_scale": scale, **inputs}, (codes.float() * wide).to(weight.dtype)


def config_of(algorithm: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"], **more}


MAKERS = {
    "NVFP4": nvfp4,
    "FP8": fp8,
    "FP8_PER_CHANNEL_PER_TOKEN": lambda name, weight: fp8(name, weight, channel=True),
}


@pytest.mark.parametrize("algorithm", MAKERS)
def test_weights_of_modelopt(algorithm: str, plain: Path, tmp_path: Path) -> None:
    source, copy = made.write(plain, tmp_path, config_of(algorithm), MAKERS[algorithm], shards=3)
    found, expected = Checkpoint.open(source), Checkpoint.open(copy)
    assert found.tensors.keys() == expected.tensors.keys()
    for name in expected.tensors:
        assert torch.equal(found.read(name), expected.read(name)), name
    model = qkit.load(source)
    module = model.get_submodule(UP)
    assert isinstance(module, QuantLinear) and module.activations is not None


def int4(name: str, weight: torch.Tensor, smooth: torch.Tensor | None = None) -> tuple[made.Tensors, torch.Tensor]:
    """After ModelOpt's pack_int4_in_uint8, in groups of 32: two rows in a byte, of a weight divided by pre_quant_scale."""
    stem = name.removesuffix("weight")
    wide = torch.ones(weight.shape[1]) if smooth is None else smooth.float()
    tiles = (weight.float() / wide).unflatten(1, (-1, 32))
    scale = tiles.abs().amax(-1) / 7
    codes = (tiles / scale[..., None]).round().clamp(-8, 7).to(torch.int8)
    decoded = (codes.float() * scale[..., None]).flatten(1) * wide
    nibbles = (codes.flatten(1).T.reshape(weight.shape[1], -1, 2)) & 15
    stored = {
        "weight": (nibbles[..., 0] | nibbles[..., 1] << 4).T.contiguous().view(torch.uint8),
        "weight_scale": scale,
    }
    more = {} if smooth is None else {f"{stem}pre_quant_scale": smooth}
    return {stem + leaf: t for leaf, t in stored.items()} | more, decoded.to(weight.dtype)


def smoothed(name: str, weight: torch.Tensor) -> tuple[made.Tensors, torch.Tensor]:
    """down_proj has a pre_quant_scale, as ModelOpt leaves it where nothing before the linear takes it."""
    smooth = torch.linspace(0.5, 2, weight.shape[1]).to(weight.dtype) if name.endswith("down_proj.weight") else None
    return int4(name, weight, smooth)


def mxfp4(name: str, weight: torch.Tensor) -> tuple[made.Tensors, torch.Tensor]:
    """After ModelOpt's MXFP4QTensor."""
    stem, tiles = name.removesuffix("weight"), weight.float().unflatten(1, (-1, 32))
    exponent = torch.ceil(torch.log2(tiles.abs().amax(-1) / 6).clamp_min(-127))
    values = tiles / torch.exp2(exponent)[..., None]
    nearest = (values.abs()[..., None] - GRID).abs().argmin(-1)
    decoded = (GRID[nearest] * torch.exp2(exponent)[..., None]).copysign(values).flatten(1)
    codes = (nearest.to(torch.uint8) | torch.signbit(values).to(torch.uint8) << 3).flatten(1)
    stored = {"weight": codes[:, 0::2] | codes[:, 1::2] << 4, "weight_scale": (exponent + 127).to(torch.uint8)}
    return {stem + leaf: t for leaf, t in stored.items()}, decoded.to(weight.dtype)


@pytest.mark.parametrize(
    ("algorithm", "maker", "packed"),
    [("W4A16_AWQ", int4, True), ("W4A16_AWQ", smoothed, False), ("MXFP4", mxfp4, True)],
)
def test_algorithms_that_are_only_read(algorithm: str, maker: Any, packed: bool, plain: Path, tmp_path: Path) -> None:
    source, copy = made.write(plain, tmp_path, config_of(algorithm), maker)
    found, expected = Checkpoint.open(source), Checkpoint.open(copy)
    assert found.tensors.keys() == expected.tensors.keys()
    for name in expected.tensors:
        assert torch.equal(found.read(name), expected.read(name)), name
    assert isinstance(qkit.load(source).get_submodule(UP), QuantLinear) == packed
    diagnosis = diagnose(source, plain)
    assert [line for line in diagnosis.to_json()["engines"] if line["engine"] == "vLLM" and line["loads_as"]] == []
    assert [f for f in diagnosis.findings if f.level == "fault"] == [] and diagnosis.to_json()["not_looked_at"] == {}
    assert all(line["error"] < 3 * line["explained"] for line in diagnosis.drift if "_proj" in line["layer"])
    if packed:
        done = convert(str(source), "compressed-tensors", tmp_path / "out", Silent())
        assert done.equal == done.linears > 0
    else:
        with pytest.raises(Unsupported, match=r"down_proj: .*multiplied by pre_quant_scale"):
            convert(str(source), "compressed-tensors", tmp_path / "out", Silent())


def test_each_layer_may_have_its_own_algorithm(plain: Path, tmp_path: Path) -> None:
    def encode(name: str, weight: torch.Tensor) -> tuple[made.Tensors, torch.Tensor]:
        return (nvfp4 if "mlp" in name else fp8)(name, weight)

    names = [n.removesuffix(".weight") for n in load_file(plain / "model.safetensors") if n.endswith("proj.weight")]
    layers = {n: {"quant_algo": "NVFP4" if "mlp" in n else "FP8", "group_size": 16} for n in names}
    source, copy = made.write(plain, tmp_path, config_of("MIXED_PRECISION", quantized_layers=layers), encode)
    found, expected = Checkpoint.open(source), Checkpoint.open(copy)
    assert all(torch.equal(found.read(n), expected.read(n)) for n in expected.tensors)
    # The older place of the same words.
    config = json.loads((source / "config.json").read_text())
    said = config.pop("quantization_config")
    inner = {"quant_algo": "MIXED_PRECISION", "quantized_layers": said["quantized_layers"]}
    (source / "config.json").write_text(json.dumps(config))
    (source / "hf_quant_config.json").write_text(json.dumps({"producer": {}, "quantization": inner}))
    older = Checkpoint.open(source)
    assert all(torch.equal(older.read(n), expected.read(n)) for n in expected.tensors)


REFUSED: list[tuple[dict[str, Any], dict[str, torch.Tensor], type[Exception], str]] = [
    (config_of("W4A8_AWQ"), {}, Unsupported, "quantized by ModelOpt's 'W4A8_AWQ', and qkit decodes NVFP4"),
    (config_of("W4A16_AWQ"), {"x.weight_scale": torch.ones(8, 2)}, BadCheckpoint, r"no groups of a weight \[16, 16\]"),
    (config_of("MIXED_PRECISION"), {}, Unsupported, "quantized_layers says of no layer how"),
    (config_of("MIXED_PRECISION", quantized_layers={"y": {}}), {}, BadCheckpoint, "quantized_layers does not list"),
    (
        config_of("NVFP4"),
        {"x.svdquant_lora_a": torch.ones(2, 32)},
        Unsupported,
        "x has svdquant_lora_a, which is added to its weight",
    ),
    (
        config_of("NVFP4_AWQ"),
        {"x.pre_quant_scale": torch.ones(8)},
        BadCheckpoint,
        r"pre_quant_scale' is F32 \[8\], expected F32 or BF16 or F16 with 32 values",
    ),
    (
        config_of("NVFP4"),
        {"x.weight": torch.zeros(8, 16)},
        BadCheckpoint,
        "x.weight' is F32 .*expected U8, a matrix",
    ),
    (config_of("NVFP4"), {"x.weight_scale_2": torch.ones(8)}, BadCheckpoint, r"F32 \[8\], expected F32 with 1 values"),
]


@pytest.mark.parametrize(("quantization", "changes", "error", "message"), REFUSED)
def test_what_is_not_decoded(
    quantization: dict[str, Any], changes: dict[str, torch.Tensor], error: type[Exception], message: str, tmp_path: Path
) -> None:
    tensors = {
        "x.weight": torch.zeros(8, 16, dtype=torch.uint8),
        "x.weight_scale": torch.ones(8, 2).to(torch.float8_e4m3fn),
        "x.weight_scale_2": torch.tensor(1.0),
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))
    save_file(tensors | changes, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(error, match=message):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(("packing", "maker"), [("auto_gptq", made.gptq), ("auto_awq", made.awq)])
def test_names_of_autoround(packing: str, maker: Any, plain: Path, tmp_path: Path) -> None:
    source, copy = maker(plain, tmp_path)
    config = json.loads((source / "config.json").read_text())
    said = config["quantization_config"]
    said |= {"quant_method": "auto-round", "packing_format": f"auto_round:{packing}", "bits": 4}
    (source / "config.json").write_text(json.dumps(config))
    found, expected = Checkpoint.open(source), Checkpoint.open(copy)
    assert all(torch.equal(found.read(n), expected.read(n)) for n in expected.tensors)


@pytest.mark.parametrize("key", ["dynamic", "extra_config"])
def test_rules_of_gptq_for_single_layers(key: str, plain: Path, tmp_path: Path) -> None:
    four, copy4 = made.gptq(plain, tmp_path / "four")
    eight, copy8 = made.gptq(plain, tmp_path / "eight", 8)
    tensors = load_file(four / "model.safetensors")
    tensors |= {n: t for n, t in load_file(eight / "model.safetensors").items() if n.startswith(f"{UP}.")}
    save_file(tensors, four / "model.safetensors", {"format": "pt"})
    config = json.loads((four / "config.json").read_text())
    config["quantization_config"][key] = {r"+:.*layers\.0\.mlp\.up_proj$" if key == "dynamic" else UP: {"bits": 8}}
    (four / "config.json").write_text(json.dumps(config))
    found, expected, other = Checkpoint.open(four), Checkpoint.open(copy4), Checkpoint.open(copy8)
    for name in expected.tensors:
        assert torch.equal(found.read(name), (other if name == f"{UP}.weight" else expected).read(name)), name
