"""Files in MLX's layout, as mlx_lm writes them: each weight is what the formula says, and zero points are kept."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantized_sources as made
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import qkit
from qkit.errors import BadCheckpoint, Unsupported
from qkit.files.checkpoint import Checkpoint
from qkit.files.sources.packed import open_packed
from qkit.nn.layers import QuantLinear
from qkit.system.progress import Silent
from qkit.workflows.convert import convert
from qkit.workflows.doctor import diagnose

GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("llama", tmp_path_factory.mktemp("plain") / "model")


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The bit stream of a row, the lowest bit of the first code first."""
    planes = (codes[..., None] >> torch.arange(bits)) & 1
    data = np.packbits(planes.flatten(1).numpy().astype("u1"), axis=1, bitorder="little")
    return torch.from_numpy(data.view("<u4"))


def affine(name: str, weight: torch.Tensor, bits: int = 4, group: int = 32, whole: bool = False) -> tuple[Any, Any]:
    """After mlx.core.quantize: the bias is the smallest weight of a group, in the dtype of the model. whole: a multiple of the
    scale, as symmetric writers have it."""
    stem, tiles = name.removesuffix("weight"), weight.float().unflatten(1, (-1, group))
    low, top = tiles.amin(-1), 2**bits - 1
    scale = ((tiles.amax(-1) - low) / top).to(weight.dtype).float()
    bias = (-(2 ** (bits - 1)) * scale if whole else low).to(weight.dtype).float()
    codes = ((tiles - bias[..., None]) / scale[..., None]).round().clamp(0, top).long()
    decoded = (codes.double() * scale.double()[..., None] + bias.double()[..., None]).float().flatten(1)
    tensors = {
        "weight": words(codes.flatten(1), bits),
        "scales": scale.to(weight.dtype),
        "biases": bias.to(weight.dtype),
    }
    return {stem + leaf: t for leaf, t in tensors.items()}, decoded.to(weight.dtype)


def nvfp4(name: str, weight: torch.Tensor) -> tuple[Any, Any]:
    """E2M1 codes under E4M3 scales of 16 columns, and no global scale."""
    stem, tiles = name.removesuffix("weight"), weight.float().unflatten(1, (-1, 16))
    scale = (tiles.abs().amax(-1) / 6).clamp_min(2**-9).to(torch.float8_e4m3fn)
    values = tiles / scale.float()[..., None]
    nearest = (values.abs()[..., None] - GRID).abs().argmin(-1)
    decoded = (GRID[nearest].copysign(values) * scale.float()[..., None]).flatten(1)
    codes = (nearest | torch.signbit(values).long() << 3).flatten(1)
    return {f"{stem}weight": words(codes, 4), f"{stem}scales": scale.view(torch.uint8)}, decoded.to(weight.dtype)


KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "affine": ({"bits": 4, "group_size": 32, "mode": "affine"}, affine),
    "no mode": ({"bits": 3, "group_size": 32}, partial(affine, bits=3)),
    "whole": ({"bits": 6, "group_size": 32, "mode": "affine"}, partial(affine, bits=6, whole=True)),
    "nvfp4": ({"bits": 4, "group_size": 16, "mode": "nvfp4"}, nvfp4),
}


def source_of(kind: str, plain: Path, work: Path, **layers: Any) -> tuple[Path, Path]:
    """(the quantized model, its decoded copy), with the config and the index of mlx_lm."""
    said, encode = KINDS[kind]
    source, copy = made.write(plain, work, None, encode, chosen=made.is_linear)
    config = json.loads((source / "config.json").read_text())
    said = {**said, **layers}
    (source / "config.json").write_text(json.dumps({**config, "quantization": said, "quantization_config": said}))
    names = load_file(source / "model.safetensors").keys()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    return source, copy


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_formula(kind: str, plain: Path, tmp_path: Path) -> None:
    source, copy = source_of(kind, plain, tmp_path)
    found, expected = Checkpoint.open(source), Checkpoint.open(copy)
    assert found.tensors.keys() == expected.tensors.keys() and "quantization" not in found.config
    for name in expected.tensors:
        assert torch.equal(found.read(name), expected.read(name)), name
    packed = isinstance(qkit.load(source).get_submodule(Q), QuantLinear)
    assert packed == (kind in ("whole", "nvfp4"))
    report = diagnose(source)
    assert report.sound, report.findings


def test_biases_that_are_no_zero_points_are_not_converted(plain: Path, tmp_path: Path) -> None:
    source, _ = source_of("affine", plain, tmp_path)
    with pytest.raises(Unsupported, match=r"\d+ of its \d+ biases are no zero point from 0 to 15 times their scale"):
        convert(str(source), "gptq", tmp_path / "out", Silent())


@pytest.mark.parametrize(("kind", "export"), [("whole", "mlx"), ("whole", "compressed-tensors"), ("nvfp4", "modelopt")])
def test_what_fits_is_converted(kind: str, export: str, plain: Path, tmp_path: Path) -> None:
    source, _ = source_of(kind, plain, tmp_path)
    done = convert(str(source), export, tmp_path / "out", Silent())
    assert done.source == "mlx" and done.equal == done.linears > 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("quantization" in config) == (export == "mlx")
    if kind == "whole":  # zero points in the middle are none
        assert {x.kept.weights.symmetric for x in open_packed(tmp_path / "out").linears.values()} == {True}


def test_a_layer_with_an_entry_of_its_own(plain: Path, tmp_path: Path) -> None:
    said = {"bits": 8, "group_size": 64, "mode": "affine"}
    source, copy = source_of("affine", plain, tmp_path, **{Q: said, "lm_head": False})
    tensors, copied = load_file(source / "model.safetensors"), load_file(copy / "model.safetensors")
    stored, decoded = affine(f"{Q}.weight", load_file(plain / "model.safetensors")[f"{Q}.weight"], 8, 64)
    save_file({**tensors, **stored}, source / "model.safetensors", {"format": "mlx"})
    save_file({**copied, f"{Q}.weight": decoded}, copy / "model.safetensors", {"format": "mlx"})
    found, expected = Checkpoint.open(source), Checkpoint.open(copy)
    assert all(torch.equal(found.read(name), expected.read(name)) for name in expected.tensors)


WRONG = [
    (f"{Q}.biases", None, BadCheckpoint, "has no tensor 'model.layers.0.self_attn.q_proj.biases' in any file"),
    (f"{Q}.scales", lambda t: t[:, :1], BadCheckpoint, r"is BF16 \[64, 1\], expected BF16 or F16 or F32 \[64, 2\]"),
    (
        f"{Q}.weight",
        lambda t: t.view(torch.int32),
        BadCheckpoint,
        r"is I32 \[64, 8\], expected U32 \[out, in \* 4 / 32\]",
    ),
    (f"{Q}.weight", lambda t: t[None], Unsupported, "has all experts of a layer, as mlx_lm stacks them"),
]


@pytest.mark.parametrize(("name", "change", "kind", "why"), WRONG)
def test_tensors_that_do_not_fit(name: str, change: Any, kind: Any, why: str, plain: Path, tmp_path: Path) -> None:
    source, _ = source_of("affine", plain, tmp_path)
    tensors = load_file(source / "model.safetensors")
    tensor = tensors.pop(name)
    (source / "model.safetensors.index.json").unlink()
    more = {} if change is None else {name: change(tensor).contiguous()}
    save_file({**tensors, **more}, source / "model.safetensors", {"format": "mlx"})
    with pytest.raises(kind, match=why):
        Checkpoint.open(source)


@pytest.mark.parametrize("said", [{"mode": "mxfp6"}, {"bits": 7}, {"group_size": None}, {"bits": "4"}])
def test_settings_that_nothing_decodes(said: dict[str, Any], plain: Path, tmp_path: Path) -> None:
    source, _ = source_of("affine", plain, tmp_path, **said)
    with pytest.raises(
        Unsupported, match=r"config\.json: quantization: .* and qkit decodes mxfp4, mxfp8, nvfp4 and affine"
    ):
        Checkpoint.open(source)


def without(folder: Path, name: str) -> None:
    """The folder without one tensor."""
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "mlx"})
    (folder / "model.safetensors.index.json").unlink()


DEFECTS = [
    ({}, f"{Q}.biases", "lost tensors", "it has no biases"),
    ({"bits": 8}, None, "config", "its weight is U32"),
    ({"mode": "mxfp6"}, None, "config", "mode mxfp6 with 4 bits"),
    ({Q: False}, None, "config", "it is quantized"),
    ({"lm_head": {"bits": 4, "group_size": 32, "mode": "affine"}}, None, "config", "the weight is plain"),
]


@pytest.mark.parametrize(("said", "lost", "kind", "found"), DEFECTS, ids=[found for *_, found in DEFECTS])
def test_doctor_names_a_defect(said: Any, lost: str | None, kind: str, found: str, tmp_path: Path) -> None:
    model = tiny_models.make("llama", tmp_path / "plain", tie_word_embeddings=False)
    source, _ = source_of("affine", model, tmp_path, **said)
    if lost is not None:
        without(source, lost)
    report = diagnose(source)
    assert not report.sound
    assert any(f.kind == kind and found in f.found for f in report.findings), report.findings
