"""Diffusion transformers: every declared class, from a folder to a packed one that diffusers loads."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers: pip install 'qkit[diffusion]'")

import diffusers
from tiny_dits import CONFIGS, call_of, make, make_pipeline
from torch import Tensor

import qkit
from qkit.calibration.block_calls import enter
from qkit.calibration.dataset import Calibration
from qkit.calibration.statistics import Accumulator, Stats, StatsRequest, piece_of
from qkit.diffusion.controller import SKIPPED
from qkit.diffusion.trajectory import Sampling, Trajectory, chosen_steps, sample
from qkit.engine.entry import quantizing_hook
from qkit.errors import BadCalibration, BadCheckpoint, QkitError, Unsupported, UsageError, VerifyFailure
from qkit.files.checkpoint import Checkpoint
from qkit.runtime.loading import PackedStructure
from qkit.system.machine import run_dtype
from qkit.tensor.activations import quantize_activations, static_scale
from qkit.tensor.compressed_tensors import read
from qkit.tensor.formats import ACTIVATION_FORMATS, scheme
from qkit.tensor.qtensor import dequantize
from qkit.transforms.scales import search, smoothquant_candidates, squared_error
from qkit.verification.verify import verify
from qkit.workflows.quantize import Request, open_structure, prepare, quantize


class Quiet:
    def start(self, what: str, total: int) -> None: ...
    def step(self, amount: int = 1) -> None: ...


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dits")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("pipelines") / "wan", steps=6)


def transformer(folders: Path, kind: str) -> Path:
    path = folders / kind
    return path if path.is_dir() else make(kind, path)


def load(kind: str, path: Path, dtype: torch.dtype) -> Any:
    return getattr(diffusers, CONFIGS[kind][0]).from_pretrained(path, dtype=dtype).eval()


def output(model: Any, kind: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    with torch.inference_mode():
        made: Tensor = model(**call_of(kind, seed, dtype=dtype)).sample.float()
    return made


class ByHand:
    """Calls of a transformer without a pipeline."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def calls(self, folder: Path) -> Iterator[dict[str, Any]]:
        dtype = run_dtype(torch.bfloat16)  # as a pipeline of these weights would sample
        yield from (call_of(self.kind, seed, 900.0 - 200 * seed, dtype) for seed in range(3))


def hand_made(kind: str) -> Calibration:
    tokens = torch.empty(3, 0, dtype=torch.int64)
    return Calibration(source="by hand", samples=3, seqlen=0, digest="0" * 64, tokens=tokens, trajectory=ByHand(kind))


def reference(kind: str, source: Path, packed: Path, dtype: torch.dtype) -> Any:
    """The original class with dequantized weights, and hooks that quantize activations."""
    model, structure = load(kind, source, dtype), PackedStructure(Checkpoint.open(packed, quantized=True))
    for linear in (x for b in structure.blocks for x in b.linears if x.name in structure.formats):
        weights, activations = structure.formats[linear.name]
        stored = {n.rpartition(".")[2]: n for n in structure.checkpoint.tensors if n.rpartition(".")[0] == linear.name}
        tensors = {leaf: structure.checkpoint.read(n) for leaf, n in stored.items()}
        module = model.get_submodule(linear.name)
        module.weight.data = dequantize(read(tensors, weights, linear.shape)).to(dtype)
        if activations is not None:
            static = tensors.get("input_global_scale")
            module.register_forward_pre_hook(quantizing_hook(activations, None if static is None else static.float()))
    return model


@pytest.mark.parametrize("scheme", ["w8a8", "nvfp4"])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_every_class_packs_and_loads(folders: Path, tmp_path: Path, kind: str, scheme: str) -> None:
    source = transformer(folders, kind)
    request = Request(model=str(source), scheme=scheme, threads=1)
    found = prepare(request, hand_made(kind) if scheme == "nvfp4" else None)
    report = quantize(request, tmp_path / "out", Quiet(), prepared=found)
    assert report.ok and report.linears == len(found.plan.linears) and report.linears >= 12
    assert verify(tmp_path / "out").ok
    packed = output(load(kind, tmp_path / "out", torch.bfloat16), kind, torch.bfloat16)
    exact = output(reference(kind, source, tmp_path / "out", torch.float32), kind, torch.float32)
    wide = output(qkit.load(tmp_path / "out", dtype=torch.float32), kind, torch.float32)
    half = output(reference(kind, source, tmp_path / "out", torch.bfloat16), kind, torch.bfloat16)
    assert (wide - exact).norm() <= 1e-3 * exact.norm()  # an input between two codes may fall to the other side
    assert (packed - exact).norm() <= 2 * (half - exact).norm()
    assert (packed - output(load(kind, source, torch.bfloat16), kind, torch.bfloat16)).norm() > 1e-3 * exact.norm()


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_rows_run_through_blocks_as_the_model_runs_them(folders: Path, kind: str) -> None:
    """What enters and leaves blocks, one after another, by the recorded calls: to the bit what the model computes."""
    source = transformer(folders, kind)
    model, structure = load(kind, source, torch.float32), open_structure(str(source))
    paths = [b.path for b in structure.blocks]
    seen: dict[str, Any] = {}
    handles = [
        model.get_submodule(p).register_forward_hook(lambda _, __, out, p=p: seen.__setitem__(p, out)) for p in paths
    ]
    output(model, kind, torch.float32)
    for handle in handles:
        handle.remove()
    sample = {**call_of(kind, dtype=torch.float32), "return_dict": False}
    (hidden, calls), *_ = enter(model, paths, [sample], streams=structure.family.streams)
    names = structure.family.streams.returns
    for i, path in enumerate(paths):
        with torch.inference_mode():
            hidden = calls[i](model.get_submodule(path), hidden)
        made = seen[path] if isinstance(seen[path], tuple) else (seen[path],)
        by_name = dict(zip(names, made, strict=True))
        parts = [by_name[n] for n in structure.family.streams.names if by_name[n] is not None]
        assert torch.equal(hidden, torch.cat(parts, -2)), path


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_modulation_stays_by_default_and_a_rule_takes_it(folders: Path, kind: str) -> None:
    source = transformer(folders, kind)
    plan = prepare(Request(model=str(source), scheme="w8a8")).plan
    assert all("norm" not in name for name in plan.linears)
    kept = [name for name, why in plan.skipped.items() if "shifts, scales and gates" in why]
    assert bool(kept) == (kind in ("cogvideox", "hunyuan", "flux", "sd3", "dit"))
    if kept:
        rules = ({"match": "*norm1.linear", "scheme": "w8a8"},)
        taken = prepare(Request(model=str(source), scheme="w8a8", rules=rules)).plan
        assert any(name.endswith("norm1.linear") for name in taken.linears)


@pytest.mark.parametrize("kind", ["sd3", "cogvideox", "dit"])
def test_the_timesteps_of_calibration_are_a_finite_set(folders: Path, tmp_path: Path, kind: str) -> None:
    """What makes shifts, scales and gates has one input a step (finite set calibration of TFMQ-DM, arXiv 2311.16503).

    GPTQ, which sees them all, fits INT3 weights to them; rounding does not. Of three steps a third of the error is left, or
    less."""
    source, errors = transformer(folders, kind), {}
    original = load(kind, source, torch.float32)
    rules = ({"match": "*norm1.linear", "scheme": "w3a16", "group_size": 32},)
    for method in ("rtn", "gptq"):
        request = Request(model=str(source), scheme="w8a16", method=method, rules=rules, threads=1)
        quantize(request, tmp_path / method, Quiet(), prepared=prepare(request, hand_made(kind)))
        made = reference(kind, source, tmp_path / method, torch.float32)
        a, b = (modulations(model, kind) for model in (original, made))
        errors[method] = float((a - b).norm() / a.norm())
    assert errors["gptq"] < errors["rtn"] / 3


def modulations(model: Any, kind: str) -> Tensor:
    """All outputs of norm1.linear at the steps of ``ByHand``."""
    found: list[Tensor] = []
    for name, module in model.named_modules():
        if name.endswith("norm1.linear"):
            module.register_forward_hook(lambda module, args, out: found.append(out.flatten()))
    with torch.inference_mode():
        for seed in range(3):
            model(**call_of(kind, seed, 900.0 - 200 * seed, torch.float32))
    return torch.cat(found)


# ---- pipelines ---------------------------------------------------------------------------------------------------


def latents(pipe: Any, seed: int = 0, **over: Any) -> Tensor:
    call = {"num_inference_steps": 6, "height": 16, "width": 16, "num_frames": 2, "max_sequence_length": 8, **over}
    pipe.set_progress_bar_config(disable=True)
    made = pipe("a red ball moves left", generator=torch.Generator().manual_seed(seed), output_type="latent", **call)
    found: Tensor = made.frames
    return found


@pytest.fixture(scope="module")
def packed(pipeline: Path) -> Path:
    """6bit with half of the inputs in NVFP4, and a cache."""
    out = pipeline.with_name("packed")
    policy = {"width": 6.0, "skips": 0.2}
    report = quantize(Request(model=str(pipeline), scheme="6bit", policy=policy, samples=8), out, Quiet())
    assert report.ok
    return out


def test_a_packed_pipeline_loads_through_diffusers(packed: Path) -> None:
    own = latents(qkit.load(packed))
    stock = latents(diffusers.DiffusionPipeline.from_pretrained(packed, dtype=torch.float32))
    assert torch.equal(own, stock) and own.isfinite().all()


def test_what_is_around_the_transformer_is_copied(pipeline: Path, packed: Path) -> None:
    files = [p.relative_to(pipeline) for p in pipeline.rglob("*") if p.is_file() and "transformer" not in p.parts]
    assert len(files) >= 8
    called = json.loads((packed / "sampling.json").read_text())
    assert called == json.loads((pipeline / "sampling.json").read_text())
    for name in (f for f in files if f.name != "sampling.json"):
        assert (packed / name).read_bytes() == (pipeline / name).read_bytes(), name


def test_without_the_import_diffusers_refuses(packed: Path) -> None:
    code = f"import diffusers; diffusers.DiffusionPipeline.from_pretrained({str(packed)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and "Unknown quantization type" in done.stderr


@pytest.mark.parametrize("damage", ["changed", "added", "missing", "code"])
def test_verify_sees_damage_around_the_transformer(packed: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    shutil.copytree(packed, out)
    assert verify(out).ok
    victim = out / "vae" / "config.json"
    if damage == "changed":
        victim.write_text(victim.read_text() + " ")
    elif damage == "added":
        (out / "vae" / "more.json").write_text("{}")
    elif damage == "missing":
        victim.unlink()
    else:
        (out / "vae" / "pipeline.py").write_text("")
    problems = verify(out).problems
    assert problems and all(p.where.startswith("vae/") for p in problems)


def test_a_damaged_result_is_not_taken_for_done(pipeline: Path, packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "out")
    (tmp_path / "out" / "vae" / "config.json").unlink()
    request = Request(model=str(pipeline), scheme="6bit", policy={"width": 6.0, "skips": 0.2}, samples=8)
    with pytest.raises(VerifyFailure, match="was damaged since"):
        quantize(request, tmp_path / "out", Quiet())


def test_the_plan_knows_the_rest_of_the_pipeline(pipeline: Path, tmp_path: Path) -> None:
    shutil.copytree(pipeline, tmp_path / "p")
    before = prepare(Request(model=str(tmp_path / "p"), scheme="w8a8")).plan.hash
    file = tmp_path / "p" / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace("3.0", "5.0"))
    assert prepare(Request(model=str(tmp_path / "p"), scheme="w8a8")).plan.hash != before


def test_half_precision_is_calibrated(tmp_path: Path, run: Any) -> None:
    """Weights in bfloat16 are sampled in what the machine multiplies fast; prompts and arguments go with the result."""
    source = make_pipeline(tmp_path / "wan", steps=4, dtype=torch.bfloat16)
    sampling = json.loads((source / "sampling.json").read_text())
    (source / "sampling.json").unlink()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball\n\na blue square\n")
    call = [x for k, v in sampling["call"].items() for x in ("--call", f"{k}={v}")]
    command = ("quantize", "--model", source, "--scheme", "nvfp4", "--samples", 2, "--out", tmp_path / "out")
    assert run(*command)[0] == 2
    code, _, err = run(*command, "--calib", prompts, *call)
    assert code == 0, err
    kept = json.loads((tmp_path / "out" / "sampling.json").read_text())
    assert kept == {"call": sampling["call"], "prompts": ["a red ball", "a blue square"]}
    assert run("eval", tmp_path / "out", "--videos", 1)[0] == 0
    call = ["num_inference_steps=0" if x.startswith("num_inference_steps=") else x for x in call]
    code, _, err = run(*command[:-1], tmp_path / "none", "--calib", prompts, *call)
    assert code == 3 and "did not call its transformer" in err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tau": -5}, "tau"),
        ({"threshold": "nan"}, "threshold"),
        ({"most": 10**9}, "most"),
        ({"fits": {"nowhere": [0.0, 1.0]}}, "is no quantized linear"),
        ({"computed": [7], "steps": 6}, "expected steps below 6"),
        ({"gains": {"3": [1.0, 70.0]}}, "gains"),
    ],
)
def test_verify_looks_at_the_policy(packed: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    shutil.copytree(packed, tmp_path / "out")
    file = tmp_path / "out" / "transformer" / "qkit.json"
    record = json.loads(file.read_text())
    record["diffusion"].update(changes)
    file.write_text(json.dumps(record))
    problems = verify(tmp_path / "out").problems
    assert problems and said in str(problems[0])


def test_verify_follows_no_links(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "out")
    (tmp_path / "out" / "extra").symlink_to("/tmp")
    assert any("is a link" in str(p) for p in verify(tmp_path / "out").problems)


def test_the_same_request_is_done_at_once_and_another_goes_on(pipeline: Path, packed: Path) -> None:
    before = (packed / "transformer" / "qkit.json").stat().st_mtime_ns
    policy = {"width": 6.0, "skips": 0.2}
    quantize(Request(model=str(pipeline), scheme="6bit", policy=policy, samples=8), packed, Quiet())
    assert (packed / "transformer" / "qkit.json").stat().st_mtime_ns == before


class Stop(Exception):
    pass


class Stopping(Quiet):
    """Stops when the block of that number is to be started."""

    def __init__(self, at: str) -> None:
        self.at = at

    def start(self, what: str, total: int) -> None:
        if what.startswith(self.at):
            raise Stop


@pytest.mark.parametrize("at", ["transformer block 2/2", "observe"])
def test_a_stopped_run_goes_on_to_the_same_bytes(pipeline: Path, packed: Path, tmp_path: Path, at: str) -> None:
    request = Request(model=str(pipeline), scheme="6bit", policy={"width": 6.0, "skips": 0.2}, samples=8)
    with pytest.raises(Stop):
        quantize(request, tmp_path / "out", Stopping(at))
    assert not (tmp_path / "out").exists()
    quantize(request, tmp_path / "out", Quiet())
    for name in ("diffusion_pytorch_model.safetensors", "qkit.json"):
        assert (tmp_path / "out" / "transformer" / name).read_bytes() == (packed / "transformer" / name).read_bytes()


# ---- the trajectory ----------------------------------------------------------------------------------------------


def test_steps_are_spread_over_the_schedule() -> None:
    assert chosen_steps(20, 0, 8) == (0, 2, 5, 7, 10, 12, 15, 17)
    every = {s for prompt in range(3) for s in chosen_steps(20, prompt, 8)}
    assert every == set(range(20))
    assert chosen_steps(4, 5, 8) == (0, 1, 2, 3) and chosen_steps(20, 0, 2) == (0, 10)


def test_rows_are_calls_of_the_sampler(pipeline: Path, tmp_path: Path) -> None:
    call = json.loads((pipeline / "sampling.json").read_text())["call"]
    made = Trajectory(
        folder=pipeline, sampling=Sampling(("a red ball", "a blue ball"), call), samples=9, seed=0, dtype=torch.float32
    )
    first, second = list(made.calls(tmp_path)), list(made.calls(tmp_path))
    assert not list(tmp_path.iterdir())
    assert len(first) == 18  # two guidance branches
    times = [float(c["timestep"][0]) for c in first]
    assert len(set(times[:12])) == 6 and times[0] == times[1] and times == sorted(times[:12], reverse=True) + times[12:]
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a if isinstance(a[k], Tensor))
    assert not torch.equal(first[0]["encoder_hidden_states"], first[1]["encoder_hidden_states"])


def test_rows_stay_within_their_memory(pipeline: Path, tmp_path: Path) -> None:
    """A calibration of all 20 steps holds one call at a time; one that is larger than the cap is refused."""
    call = {**json.loads((pipeline / "sampling.json").read_text())["call"], "num_inference_steps": 20}
    sampling = Sampling(("a red ball",), call)
    sizes, held = [], []
    gc.collect()
    gc.freeze()  # what is there already is not looked at with every call
    for row in Trajectory(
        folder=pipeline, sampling=sampling, samples=16, seed=0, dtype=torch.float32, cap=10_000
    ).calls(tmp_path):
        sizes.append(sum(v.nbytes for v in row.values() if isinstance(v, Tensor)))
        gc.collect()
        shapes = {row["hidden_states"].shape}
        held.append(sum(isinstance(o, Tensor) and o.shape in shapes for o in gc.get_objects()))
    gc.unfreeze()
    assert len(sizes) == 32 and max(sizes) <= 10_000 < sum(sizes)
    assert max(held) < 8  # of 32: this call's, and what the sampler itself keeps
    with pytest.raises(BadCalibration, match="--rows-memory"):
        list(
            Trajectory(folder=pipeline, sampling=sampling, samples=16, seed=0, dtype=torch.float32, cap=1_000).calls(
                tmp_path
            )
        )


def test_gptq_along_the_trajectory_is_better_than_rounding(pipeline: Path, tmp_path: Path) -> None:
    errors = {}
    for method in ("rtn", "gptq"):
        quantize(Request(model=str(pipeline), scheme="w3a16", method=method, samples=16), tmp_path / method, Quiet())
        record = json.loads((tmp_path / method / "transformer" / "qkit.json").read_text())
        found = latents(qkit.load(tmp_path / method))
        original = latents(qkit.load(pipeline))
        errors[method] = float((found - original).norm() / original.norm())
        assert record["calibration"] is None or record["calibration"]["samples"] == 16
    assert errors["gptq"] < errors["rtn"] < 1


# ---- bad input ---------------------------------------------------------------------------------------------------


def index_of(pipeline: Path, tmp_path: Path, **changes: Any) -> Path:
    out = tmp_path / "pipe"
    shutil.copytree(pipeline, out)
    file = out / "model_index.json"
    data = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in data.items() if v != "drop"}))
    return out


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"transformer": "drop"}, Unsupported, "without a transformer (its components: scheduler, text_encoder"),
        ({"transformer": "drop", "unet": ["diffusers", "UNet2DConditionModel"]}, Unsupported, "with a U-Net"),
        ({"vae": ["os", "system"]}, BadCheckpoint, "component 'vae' is"),
        ({"vae": {"os": 1, "system": 2}}, BadCheckpoint, "component 'vae' is"),
        ({"vae": ["pipeline", "MyVae"]}, BadCheckpoint, "code inside a pipeline is never run"),
        ({"../unet": ["diffusers", "UNet2DConditionModel"]}, BadCheckpoint, "component"),
        ({"_class_name": ["pipeline", "Mine"]}, BadCheckpoint, "_class_name is missing or not a name"),
    ],
)
def test_pipelines_that_are_refused(
    pipeline: Path, tmp_path: Path, changes: dict[str, Any], kind: type[QkitError], said: str
) -> None:
    with pytest.raises(kind) as e:
        open_structure(str(index_of(pipeline, tmp_path, **changes)))
    assert said in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["AutoencoderKL", "MysteryTransformer3DModel", ["a", "b"]])
def test_unknown_classes_are_refused(folders: Path, tmp_path: Path, name: Any) -> None:
    shutil.copytree(transformer(folders, "wan"), tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": name}))
    with pytest.raises(Unsupported) as e:
        open_structure(str(tmp_path / "m"))
    assert "is no transformer or U-Net of diffusers" in str(e.value)


def test_a_scheduler_that_changes_its_steps_is_refused(pipeline: Path) -> None:
    pipe = qkit.load(pipeline)
    call = json.loads((pipeline / "sampling.json").read_text())["call"]
    calls = 0

    def shorten(_: Any, __: Any, ___: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            pipe.scheduler.timesteps = pipe.scheduler.timesteps[:-1]

    pipe.transformer.register_forward_pre_hook(shorten, with_kwargs=True)
    with pytest.raises(BadCalibration) as e:
        sample(pipe, "a red ball", call, 0)
    assert "changed its steps in mid-run" in str(e.value)


def test_requests_that_make_no_sense(folders: Path, pipeline: Path, tmp_path: Path) -> None:
    alone = str(transformer(folders, "wan"))
    with pytest.raises(UsageError, match="without its pipeline"):
        prepare(Request(model=alone, scheme="w4a16", method="gptq"))
    with pytest.raises(UsageError, match="takes no such argument"):
        quantize(Request(model=str(pipeline), scheme="nvfp4", call={"hight": 16}), tmp_path / "o", Quiet())
    with pytest.raises(UsageError, match="gives this argument itself"):
        prepare(Request(model=str(pipeline), scheme="nvfp4", call={"generator": 16}))
    with pytest.raises(Unsupported, match="diffusion sampler"):
        prepare(Request(model="tiny-llama", scheme="6bit"))
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(BadCalibration, match="no prompt"):
        prepare(Request(model=str(pipeline), scheme="nvfp4", calib=tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("profile", "--candidates", "int4"), "a profile is for language models, and this is a WanTransformer3DModel"),
        (("quantize", "--bits", "4.5"), "a budget is for language models"),
        (("quantize", "--scheme", "w4a16", "--kv", "int8"), "--kv is for language models"),
        (("quantize", "--scheme", "w4a16", "--significant", "0.1"), "--significant needs the loss"),
        (("quantize", "--scheme", "w4a16", "--method", "mbq"), "balances images and answers"),
        (("quantize", "--scheme", "w4a16", "--method", "rotate"), "in wan, no token is predicted from those before it"),
        (("quantize", "--scheme", "6bit", "--policy", "width=9"), "policy.width"),
        (("quantize", "--scheme", "6bit", "--policy", "wide=6"), "no policy 'wide'"),
        (("quantize", "--scheme", "w4a8", "--policy", "width=6"), "needs layers with NVFP4 weights"),
    ],
)
def test_what_is_not_for_pipelines(
    pipeline: Path, tmp_path: Path, run: Any, command: tuple[str, ...], said: str
) -> None:
    code, _, err = run(*command, "--model", pipeline, "--out", tmp_path / "out")
    assert code in (2, 3) and said in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_pipeline_is_evaluated_by_its_samples(pipeline: Path, run: Any) -> None:
    code, _, err = run("eval", pipeline)
    assert code == 2 and "measure it with --videos N" in err


def test_the_log_says_what_was_done(packed: Path) -> None:
    pipe = qkit.load(packed)
    latents(pipe)
    steps = pipe.transformer.steps
    assert {c.step for c in steps.log} == set(range(6)) and {c.branch for c in steps.log} == {0, 1}
    assert all(c.choice != SKIPPED for c in steps.log if c.step < 2)
    assert 4 < steps.width < 8 and 0 < steps.skipped < 0.5
    bits = {"nvfp4_dynamic": 4, "int8_token": 8, "as they are": 16}
    said = [bits[c.choice] for c in steps.log if c.linear]
    assert steps.width == sum(said) / len(said)
    runs = [c.choice for c in steps.log if not c.linear]
    assert len(runs) == 2 * 2 * 6 and steps.skipped == runs.count(SKIPPED) / len(runs)


@pytest.mark.parametrize("name", ["int8_token", "nvfp4_dynamic", "fp8_token"])
def test_a_loud_first_token_takes_nothing_from_the_others(name: str) -> None:
    """The first token of a CLIP text is some eighty times as large as the others (MixDQ, arXiv 2405.17873, section 3.2, keeps
    its products in 16 bits). Scales by token, or by block of a token, do not know of it: the other rows are as without it;
    one scale for all, as W8A8 has in MixDQ, costs them more than 20 dB."""
    x = torch.randn(77, 64, generator=torch.Generator().manual_seed(0))
    loud = x.clone()
    loud[0] *= 80
    fmt = ACTIVATION_FORMATS[name]

    def noise(given: torch.Tensor) -> float:
        static = torch.tensor([static_scale(float(given.abs().max()), fmt)]) if fmt.strategy == "tensor_group" else None
        found = quantize_activations(given, fmt, static)[1:]
        return float((found - given[1:]).norm() / given[1:].norm())

    assert noise(loud) < 1.1 * noise(x)
    if name == "int8_token":
        scale = loud.abs().max() / 127
        shared = float(((loud / scale).round() * scale - loud)[1:].norm() / loud[1:].norm())
        assert shared > 10 * noise(loud)


def test_smoothquant_sees_either_half_of_the_timesteps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges of both halves reach its candidates, and the larger of them is the range of all."""
    seen: list[Stats] = []

    def spy(weights: list[torch.Tensor], stats: Stats) -> list[torch.Tensor]:
        seen.append(stats)
        return smoothquant_candidates(weights, stats)

    monkeypatch.setattr("qkit.transforms.scales.smoothquant_candidates", spy)
    source = make_pipeline(tmp_path / "wan", steps=4)
    assert quantize(
        Request(model=str(source), scheme="w4a8", method="smoothquant", samples=8), tmp_path / "out", Quiet()
    ).ok
    assert seen and all(s.by_time is not None and torch.equal(s.by_time.amax(0), s.absmax) for s in seen)
    assert any(not torch.equal(s.by_time[0], s.by_time[1]) for s in seen if s.by_time is not None)


def test_an_outlier_of_some_timesteps_counts_half() -> None:
    """A channel that is loud in one half only: the second set of candidates smooths it less, and the search loses nothing."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=g)
    x[128:, 3] *= 40
    w, wanted = [torch.randn(32, 64, generator=g)], StatsRequest(hessian=False, ranges=True)
    gathered = Accumulator(64, wanted, torch.float32)
    for part in (0, 1):
        gathered.add(piece_of(x[128 * part : 128 * part + 128], 1, True), part)
    stats = gathered.finish()
    assert stats.by_time is not None and torch.equal(stats.by_time[1], x[128:].abs().amax(0))
    both, plain = smoothquant_candidates(w, stats), smoothquant_candidates(w, replace(stats, by_time=None))
    assert len(both) == 2 * len(plain) and all(map(torch.equal, both, plain))
    assert both[15 + 8][3] < both[8][3]
    form = scheme("w8a8")

    def loss(s: torch.Tensor) -> float:
        found = list[float]()

        def note(outputs: list[torch.Tensor], references: list[torch.Tensor]) -> float:
            found.append(squared_error(outputs, references))
            return found[-1]

        search(w, stats, form, [s], torch.float32, note)
        return found[-1]

    chosen = search(w, stats, form, both, torch.float32, squared_error)
    assert loss(chosen) <= loss(search(w, stats, form, plain, torch.float32, squared_error))
    assert Accumulator(64, wanted, torch.float32).finish().by_time is None


def test_what_cannot_be_is_said_before_a_job_begins(run, tmp_path: Path) -> None:
    """A job that was begun by a mistyped command would refuse the corrected one."""
    source, out = make_pipeline(tmp_path / "wan", steps=3), tmp_path / "out"
    for given, code, said in (
        (("--model", source, "--scheme", "nvfp4", "--call", "hieght=16"), 2, "did you mean height"),
        (("--model", "tiny-llama", "--scheme", "w4a16", "--call", "height=16"), 2, "this model is none"),
        (("--model", "tiny-llama", "--scheme", "w4a16", "--policy", "width=5"), 3, "--policy act at every step"),
        (("--model", source, "--scheme", "6bit", "--policy", "wdith=5"), 3, "did you mean width"),
    ):
        found, _, err = run("quantize", *given, "--out", out)
        assert found == code and said in err and len(err.strip().splitlines()) == 1, (given, err)
        assert not out.exists() and not out.with_name("out.job").exists()


def test_what_a_policy_comes_to_is_said(run, tmp_path: Path) -> None:
    source = make_pipeline(tmp_path / "wan", steps=4)
    code, said, err = run("quantize", "--model", source, "--scheme", "6bit", "--samples", 4, "--out", tmp_path / "out",
                          "--target", "text_encoder=w8a16", "--policy", "width=7")  # fmt: skip
    assert code == 0, err
    assert "text_encoder: W8A16, 0.02 MB before" in said and "bits of inputs (asked 7)" in " ".join(said.split())
