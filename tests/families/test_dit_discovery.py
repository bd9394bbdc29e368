"""Transformers and U-Nets of diffusers that no family declares: found by structure, quantized, loaded, verified."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers: pip install 'qkit[diffusion]'")

import diffusers
from tiny_dits import make, make_pipeline

import qkit
from qkit.calibration.dataset import Calibration
from qkit.diffusion.pipeline import own_steps
from qkit.errors import Unsupported, UsageError
from qkit.families import declared, discover
from qkit.solvers.task import ZERO_INPUTS
from qkit.verification.verify import verify
from qkit.workflows.quantize import Request, open_structure, prepare, quantize

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import sweep_diffusers as sweep

FAST = (
    "Flux2Transformer2DModel",  # two kinds of blocks, packed projections
    "Lumina2Transformer2DModel",  # refiners before the blocks
    "HiDreamImageTransformer2DModel",  # experts, which are modules
    "NucleusMoEImageTransformer2DModel",  # experts in one tensor, transposed
    "ZImageTransformer2DModel",  # arguments that are lists
    "SanaVideoTransformer3DModel",  # convolutions in blocks
    "LTX2VideoTransformer3DModel",  # two streams, of pictures and of sound
)


def case(name: str) -> sweep.Case:
    return next(c for c in sweep.cases() if c.name == name)


@pytest.mark.parametrize("name", FAST)
def test_an_undeclared_class_is_quantized_and_loads(name: str, tmp_path: Path) -> None:
    line = sweep.run_case(case(name), tmp_path)
    assert sweep.is_full(line), line
    assert line["rtn"] == line["gptq"] == "ok"
    assert verify(tmp_path / "gptq").ok
    linears = json.loads((tmp_path / "gptq" / "qkit.json").read_text())["linears"].values()
    assert ZERO_INPUTS not in {x["fallback"] for x in linears}  # the inputs that were recorded are the blocks' own


def test_everything_that_stays_is_listed_with_its_reason(tmp_path: Path) -> None:
    sweep.make(case("SanaVideoTransformer3DModel"), tmp_path)
    plan = prepare(Request(model=str(tmp_path), scheme="w8a16")).plan
    reasons = {why for name, why in plan.skipped.items() if "conv" in name}
    assert reasons == {"it is a convolution, and qkit quantizes linears"}
    sweep.make(case("NucleusMoEImageTransformer2DModel"), tmp_path / "moe")
    plan = prepare(Request(model=str(tmp_path / "moe"), scheme="w8a16")).plan
    assert not [name for name in plan.skipped if "experts" in name]


@pytest.mark.parametrize("kind", ["wan", "flux"])
def test_discovery_gives_the_plan_and_the_bytes_of_a_declaration(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(kind, tmp_path / "m")
    request, plans = Request(model=str(source), scheme="w4a16", threads=1), []
    for name in ("declared", "discovered"):
        prepared = prepare(request)
        quantize(request, tmp_path / name, sweep.Silent(), prepared=prepared)
        plans.append(prepared.plan)
        monkeypatch.setattr(discover, "DECLARED", tuple(f for f in declared.DECLARED if f.name != kind))
    assert plans[0].family == kind
    assert plans[1].family.startswith("discovered:")
    assert sorted(plans[0].linears.items()) == sorted(plans[1].linears.items())
    assert plans[0].skipped.items() <= plans[1].skipped.items()  # discovery lists convolutions outside the blocks too
    first, second = (read_all(tmp_path / name) for name in ("declared", "discovered"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "diffusion_pytorch_model.safetensors")


def rows(of: sweep.Case) -> Calibration:
    tokens, trajectory = torch.empty(2, 0, dtype=torch.int64), sweep.Calls(of.call)
    return Calibration(source="calls", samples=2, seqlen=0, digest="0" * 64, tokens=tokens, trajectory=trajectory)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_the_linears_of_a_unet_take_smoothquant(scheme: str, tmp_path: Path) -> None:
    unet = case("UNet2DConditionModel")
    model = sweep.make(unet, tmp_path / "m")
    request = Request(model=str(tmp_path / "m"), scheme=scheme, method="smoothquant", threads=1)
    report = quantize(request, tmp_path / "out", sweep.Silent(), prepared=prepare(request, rows(unet)))
    assert report.ok and report.linears >= 40
    expected, found = sweep.output(model, unet), sweep.output(qkit.load(tmp_path / "out"), unet)
    assert 0 < (found - expected).norm() < 0.2 * expected.norm()


def test_what_diffusers_has_not_is_refused(tmp_path: Path) -> None:
    source = make("wan", tmp_path / "m")
    file = source / "config.json"
    for name in ("AutoencoderKLWan", "Mystery3DModel", ["a"], "../x"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": name}))
        with pytest.raises(Unsupported, match="is no transformer or U-Net of diffusers"):
            open_structure(str(source))


def test_the_forecast_has_the_whole_model_while_inputs_are_recorded(tmp_path: Path) -> None:
    model = sweep.make(case("Flux2Transformer2DModel"), tmp_path)
    request = Request(model=str(tmp_path), scheme="w4a16", method="gptq", threads=1)
    forecast = prepare(request, rows(case("Flux2Transformer2DModel"))).forecast
    assert forecast.memory["record the inputs of all blocks"] == 4 * sum(p.numel() for p in model.parameters())


def test_a_policy_by_step_is_refused_where_blocks_are_recorded(tmp_path: Path) -> None:
    sweep.make(case("Flux2Transformer2DModel"), tmp_path)
    with pytest.raises(Unsupported, match="act between blocks"):
        prepare(Request(model=str(tmp_path), scheme="6bit"), rows(case("Flux2Transformer2DModel")))


# ---- pipelines with two transformers, as Wan 2.2 -------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    one = make_pipeline(folder / "one")
    pipe = diffusers.WanPipeline.from_pretrained(one)
    second = diffusers.WanTransformer3DModel.from_pretrained(one / "transformer")
    for p in second.parameters():
        p.data.mul_(1.1)
    parts = {k: v for k, v in pipe.components.items() if k != "transformer_2"}
    diffusers.WanPipeline(**parts, transformer_2=second, boundary_ratio=0.8).save_pretrained(folder / "two")
    shutil.copy(one / "sampling.json", folder / "two" / "sampling.json")
    return folder / "two"


def test_both_transformers_of_a_pipeline_are_quantized(two: Path, tmp_path: Path) -> None:
    request = Request(model=str(two), scheme="w4a16", method="gptq", samples=3, threads=1)
    assert quantize(request, tmp_path / "out", sweep.Silent()).ok
    pipe: Any = qkit.load(tmp_path / "out")
    for name in ("transformer", "transformer_2"):
        assert verify(tmp_path / "out" / name).ok
        packed = [m for m in getattr(pipe, name).modules() if type(m).__name__ == "QuantLinear"]
        assert len(packed) == 20
    assert verify(tmp_path / "out").ok


def test_one_of_two_transformers_is_quantized_where_it_is_named(two: Path, tmp_path: Path) -> None:
    skipped = Request(model=str(two), scheme="w8a16", targets={"transformer_2": "skip"}, threads=1)
    quantize(skipped, tmp_path / "first", sweep.Silent())
    assert "quantization_config" not in json.loads((tmp_path / "first" / "transformer_2" / "config.json").read_text())
    named = Request(model=str(two / "transformer_2"), scheme="w4a16", method="gptq", samples=2, threads=1)
    assert quantize(named, tmp_path / "second", sweep.Silent()).ok
    with pytest.raises(UsageError, match="no text encoder 'transformer_3'"):
        prepare(Request(model=str(two), scheme="w8a16", targets={"transformer_3": "w4a16"}))
    with pytest.raises(Unsupported, match="this pipeline has two"):
        prepare(Request(model=str(two), scheme="6bit", samples=2))


def test_each_transformer_has_its_own_steps(two: Path) -> None:
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(two)
    pipe.scheduler.set_timesteps(6)
    counts = [own_steps(pipe, name) for name in ("transformer", "transformer_2")]
    assert sum(counts) == 6 and all(counts)
