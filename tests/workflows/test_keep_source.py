"""--keep-source: layers of a quantized source go into the result with the numbers that they have, or a sentence says why
not."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantized_sources as made
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import qkit
from qkit.errors import BadRecipe, QkitError, Unsupported, UsageError
from qkit.files.checkpoint import Checkpoint
from qkit.nn.layers import QuantLinear

ROWS = {"method": "gptq", "samples": 4, "seqlen": 32}
FP8 = {"type": "float", "num_bits": 8, "symmetric": True}
INT4 = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32}
NVFP4 = {
    "type": "float",
    "num_bits": 4,
    "strategy": "tensor_group",
    "group_size": 16,
    "symmetric": True,
    "scale_dtype": torch.float8_e4m3fn,
}
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
Maker = Callable[[Path, Path], tuple[Path, Path]]
SOURCES: dict[str, tuple[Maker, str]] = {
    "fp8 in blocks": (lambda plain, out: made.fp8(plain, out, shards=2), "FP8_BLOCK"),
    "fp8, powers of two": (lambda plain, out: made.fp8(plain, out, scale_fmt="ue8m0"), "FP8_BLOCK"),
    "fp8, one scale": (lambda plain, out: made.fp8(plain, out, None), "FP8"),
    "fp8 channel": (
        lambda plain, out: made.compressed(plain, out, {**FP8, "strategy": "channel"}, "float-quantized"),
        "FP8_CHANNEL",
    ),
    "int4": (lambda plain, out: made.compressed(plain, out, {**INT4, "symmetric": True}, "pack-quantized"), "INT4"),
    "int4 asymmetric": (
        lambda plain, out: made.compressed(plain, out, {**INT4, "symmetric": False}, "pack-quantized"),
        "INT4_ASYM",
    ),
    "nvfp4": (lambda plain, out: made.compressed(plain, out, NVFP4, "nvfp4-pack-quantized"), "NVFP4A16"),
    "gptq": (lambda plain, out: made.gptq(plain, out), "INT4_ASYM"),
    "gptq sym": (lambda plain, out: made.gptq(plain, out, sym=True), "INT4"),
    "awq": (lambda plain, out: made.awq(plain, out), "INT4_ASYM"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("llama", tmp_path_factory.mktemp("plain") / "model")


def run(source: Path, out: Path, **options: Any) -> dict[str, Any]:
    qkit.quantize(source, out=out, **{"scheme": "w8a16", "keep_source": ["*.mlp.*"], **options})
    assert qkit.verify(out).ok
    record: dict[str, Any] = json.loads((out / "qkit.json").read_text())
    return record


@pytest.mark.parametrize("kind", SOURCES)
def test_numbers_are_those_of_the_source(kind: str, plain: Path, tmp_path: Path) -> None:
    # Such models are float16, in which the product of a code and a scale is rounded once.
    half = tiny_models.make("llama", tmp_path / "half", torch.float16) if kind in ("gptq", "gptq sym", "awq") else plain
    source, copy = SOURCES[kind][0](half, tmp_path)
    record = run(source, tmp_path / "out")
    kept = {name for name, linear in record["linears"].items() if linear.get("kept")}
    assert len(kept) == 6 and all(".mlp." in name for name in kept)
    assert record["linears"][UP]["solver"] == "kept" and record["linears"][UP]["scheme"].startswith(SOURCES[kind][1])
    result, expected = Checkpoint.open(tmp_path / "out"), Checkpoint.open(copy)
    for name in kept:
        assert torch.equal(result.read(f"{name}.weight"), expected.read(f"{name}.weight")), name
    qkit.quantize(copy, out=tmp_path / "all", scheme="w8a16")
    both = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "all" / "model.safetensors")
    others = [name for name in both[1] if ".mlp." not in name]
    assert others and all(torch.equal(both[0][name], both[1][name]) for name in others)
    assert type(qkit.load(tmp_path / "out").get_submodule(UP)) is QuantLinear


def test_stock_transformers_loads_it_equal(plain: Path, tmp_path: Path) -> None:
    half = tiny_models.make("llama", tmp_path / "half", torch.float16)
    sources = {
        "fp8": made.fp8(plain, tmp_path / "fp8")[0],
        "gptq": made.gptq(half, tmp_path / "gptq", sym=True)[0],
    }
    tokens, jobs = tiny_models.tokens(), tmp_path / "jobs.json"
    for name, source in sources.items():
        run(source, tmp_path / f"{name}.out")
    loads = [[str(tmp_path / f"{name}.out"), "float32"] for name in sources]
    jobs.write_text(json.dumps({"tokens": tokens.tolist(), "loads": loads}))
    script = Path(__file__).parents[1] / "stock_load.py"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-I", str(script), str(jobs)], env=environment, cwd=tmp_path, check=True)
    assert set(json.loads(Path(f"{jobs}.out").read_text()).values()) == {None}
    for folder, _ in loads:
        found = load_file(f"{folder}.float32.safetensors")["logits"]
        expected = tiny_models.logits(qkit.load(folder, dtype=torch.float32), tokens)
        assert tiny_models.relative(found, expected) < 1e-5


def test_codes_and_scales_are_the_same_bytes(plain: Path, tmp_path: Path) -> None:
    source, _ = made.fp8(plain, tmp_path)
    run(source, tmp_path / "out", **ROWS)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(before[f"{UP}.weight"].view(torch.uint8), after[f"{UP}.weight"].view(torch.uint8))
    assert torch.equal(before[f"{UP}.weight_scale_inv"], after[f"{UP}.weight_scale"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {g["format"] for g in config["config_groups"].values()} == {"float-quantized", "pack-quantized"}


def test_all_experts_of_a_layer(tmp_path: Path) -> None:
    source, _ = made.fp8(tiny_models.make("qwen3_moe", tmp_path / "plain"), tmp_path)
    record = run(source, tmp_path / "out", **ROWS, keep_source=["*.experts.*"])
    kept = {name for name, linear in record["linears"].items() if linear.get("kept")}
    assert kept == {name for name in record["linears"] if ".experts." in name} and kept
    tokens = tiny_models.tokens()
    qkit.quantize(source, out=tmp_path / "anew", scheme="w8a16")
    logits = [tiny_models.logits(qkit.load(tmp_path / name), tokens) for name in ("out", "anew")]
    assert tiny_models.relative(*logits) < 0.1  # FP8 inputs of the experts


def test_a_changed_code_is_found(plain: Path, tmp_path: Path) -> None:
    source, _ = made.fp8(plain, tmp_path)
    run(source, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    place = file.read_bytes().find(tensors[f"{UP}.weight"].view(torch.uint8).numpy().tobytes())
    with file.open("r+b") as f:
        f.seek(place)
        f.write(bytes([tensors[f"{UP}.weight"].view(torch.uint8).flatten()[0].item() ^ 1]))
    problems = [str(p) for p in qkit.verify(tmp_path / "out").problems]
    assert any(UP in p and "not the one that was intended" in p for p in problems)


def test_measured_scales_of_inputs_stay(plain: Path, tmp_path: Path) -> None:
    """FP8 with one scale a weight and one for its inputs, as vLLM's tools write it."""
    source, _ = made.fp8(plain, tmp_path, None)
    tensors = load_file(source / "model.safetensors")
    renamed = {name.replace("weight_scale_inv", "weight_scale"): t for name, t in tensors.items()}
    stems = [name.removesuffix("weight_scale") for name in renamed if name.endswith("weight_scale")]
    renamed |= {f"{stem}input_scale": torch.tensor(0.25 + i / 64) for i, stem in enumerate(stems)}
    save_file(renamed, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static"}
    (source / "config.json").write_text(json.dumps(config))
    record = run(source, tmp_path / "out")
    assert record["linears"][UP]["scheme"] == "FP8"
    assert (
        load_file(tmp_path / "out" / "model.safetensors")[f"{UP}.input_scale"].item()
        == renamed[f"{UP}.input_scale"].item()
    )
    qkit.load(tmp_path / "out")


def test_a_recipe_says_it_too(plain: Path, tmp_path: Path) -> None:
    source, _ = made.fp8(plain, tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('scheme: w8a16\nrules:\n  - {match: "*.mlp.*", keep: true}\n')
    run(source, tmp_path / "a", scheme=None, recipe=recipe, keep_source=[])
    run(source, tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    recipe.write_text('scheme: w8a16\nrules:\n  - {match: "*.mlp.*", keep: true, scheme: w4a16}\n')
    with pytest.raises(BadRecipe, match="keep leaves layers as the source stores them"):
        qkit.plan(source, recipe=recipe)


def test_learned_rounding_leaves_it_alone(plain: Path, tmp_path: Path) -> None:
    source, copy = made.fp8(plain, tmp_path)
    run(source, tmp_path / "out", scheme="w4a16", **{**ROWS, "method": "signround"}, options={"steps": 2})
    name = f"{UP}.weight"
    assert torch.equal(Checkpoint.open(tmp_path / "out").read(name), Checkpoint.open(copy).read(name))


def test_scales_of_a_cache_are_measured_beside_it(plain: Path, tmp_path: Path) -> None:
    source, _ = made.fp8(plain, tmp_path)
    run(source, tmp_path / "out", **ROWS, kv="fp8")


def test_what_is_plain_in_the_source_stays_plain(plain: Path, tmp_path: Path) -> None:
    record = run(plain, tmp_path / "out")
    assert record["skipped"][UP] == "--keep-source leaves it as it is, and the source holds it in full precision"
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")[f"{UP}.weight"],
        load_file(plain / "model.safetensors")[f"{UP}.weight"],
    )


def lying(folders: tuple[Path, Path]) -> tuple[Path, Path]:
    """The source with a config that says that its zero points are all alike."""
    config = folders[0] / "config.json"
    config.write_text(config.read_text().replace('"sym": false', '"sym": true'))
    return folders


@pytest.mark.parametrize(
    ("maker", "options", "error", "message"),
    [
        (lambda p, o: lying(made.gptq(p, o)), {}, Unsupported, "config.json says sym, and a zero point is"),
        (
            lambda p, o: made.gptq(p, o, act_order=True),
            {},
            Unsupported,
            r"GPTQ with 4 bits.*\(g_idx\): leave it out of",
        ),
        (
            made.fp8,
            {"method": "awq", "samples": 4, "seqlen": 32},
            UsageError,
            "--keep-source and method awq, which rewrites",
        ),
        (made.fp8, {"method": "rotate"}, UsageError, "--keep-source and method rotate, which rewrites"),
        (made.fp8, {"keep_source": ["*.up_proj"]}, BadRecipe, "engines load these layers as one"),
        (made.fp8, {"keep_source": ["*.nothing"]}, BadRecipe, "matches no layer"),
        (made.fp8, {"scheme": None, "bits": 6.0}, UsageError, "a budget decides over every layer"),
    ],
)
def test_what_cannot_be_kept(
    maker: Maker, options: dict[str, Any], error: type[QkitError], message: str, plain: Path, tmp_path: Path
) -> None:
    source, _ = maker(plain, tmp_path)
    with pytest.raises(error, match=message):
        qkit.plan(source, **{"scheme": "w8a16", "keep_source": ["*.mlp.*"], **options})


def test_a_sparse_result_of_qkit_cannot_be_kept(plain: Path, tmp_path: Path) -> None:
    qkit.quantize(plain, out=tmp_path / "sparse", scheme="w3a16", group_size=32, outliers=1.0)
    with pytest.raises(Unsupported, match="its sparse or low-rank part"):
        qkit.plan(tmp_path / "sparse", scheme="w8a16", keep_source=["*.mlp.*"])
