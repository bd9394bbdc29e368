"""Precision by step and the delta cache, on toys whose answers are known, and on a small pipeline."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers: pip install 'qkit[diffusion]'")

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_dits import make_pipeline
from torch import Tensor, nn

import qkit
from qkit.diffusion.clock import Clock, time_of
from qkit.diffusion.controller import SKIPPED, Controller, RuleController, attach
from qkit.diffusion.fitting import Observation, Observer, fit, least_squares, schedule_gains, skips_of
from qkit.diffusion.influence import Influence, influence_of
from qkit.diffusion.int8 import exact_product, exact_view, row_view
from qkit.diffusion.policy import NARROW, WIDE, PolicyConfig, StepPolicy
from qkit.diffusion.schedule import best_groups, group_costs
from qkit.errors import BadCheckpoint, Unsupported, UsageError
from qkit.families.blocks import Streams
from qkit.nn.layers import QuantLinear
from qkit.tensor.activations import quantize_activations, token_scale
from qkit.tensor.formats import ACTIVATION_FORMATS, FORMATS
from qkit.tensor.input_transform import InputTransform, hadamard, hadamard_block
from qkit.tensor.qtensor import dequantize, find_params, round_to_grid
from qkit.tensor.qtensor import quantize as to_codes
from qkit.workflows.quantize import Request, prepare, quantize

ONE, TWO = Streams(("hidden_states",), ("hidden_states",)), Streams(("a", "b"), ("b", "a"))


class Block(nn.Module):
    """Adds what a function of the hidden states and the time gives."""

    def __init__(self, change: Any, clock: list[float]) -> None:
        super().__init__()
        self.change, self.runs, self.clock = change, 0, clock

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.runs += 1
        out: Tensor = hidden_states + self.change(hidden_states, self.clock[0])
        return out


class Toy(nn.Module):
    def __init__(self, *changes: Any) -> None:
        super().__init__()
        self.clock = [0.0]
        self.blocks = nn.ModuleList(Block(change, self.clock) for change in changes)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        self.clock[0] = float(timestep)
        for block in self.blocks:
            hidden_states = block(hidden_states=hidden_states)
        return hidden_states


def controlled(policy: StepPolicy, *changes: Any) -> tuple[Toy, Controller]:
    model = Toy(*changes)
    inner = list(model.blocks)
    found = attach(model, Controller(policy), [f"blocks.{i}" for i in range(len(changes))], ONE)
    model.__dict__["inner"] = inner
    return model, found


def run(model: Toy, x: Tensor, times: list[float]) -> list[Tensor]:
    return [model(x, torch.tensor(t)) for t in times]


TIMES = [float(t) for t in range(1000, 0, -50)]
CACHE = StepPolicy(fits={}, threshold=-math.inf, tau=0.1)


def test_a_frozen_input_gives_the_computed_output_exactly() -> None:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    model, controller = controlled(CACHE, lambda h, _: torch.tanh(h), lambda h, _: 0.1 * h)
    plain = Toy(lambda h, _: torch.tanh(h), lambda h, _: 0.1 * h)
    cached, computed = run(model, x, TIMES), run(plain, x, TIMES)
    assert all(torch.equal(a, b) for a, b in zip(cached, computed, strict=True))
    assert model.inner[0].runs == 2 + 6  # the two first steps, then one of three
    assert controller.skipped == pytest.approx(24 / 40)


@pytest.mark.parametrize("policy", [replace(CACHE, tau=0.0), replace(CACHE, most=0)])
def test_no_cache_changes_nothing(policy: StepPolicy) -> None:
    x = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1))
    model, controller = controlled(policy, lambda h, t: torch.sin(h * t))
    plain = run(Toy(lambda h, t: torch.sin(h * t)), x, TIMES)
    assert all(torch.equal(a, b) for a, b in zip(run(model, x, TIMES), plain, strict=True))
    assert controller.skipped == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 192).map(lambda n: n / 64), min_size=3, max_size=30), st.floats(0, 2))
def test_never_more_than_two_skips_in_a_row_and_the_forecast_is_the_run(changes: list[float], tau: float) -> None:
    """``skips_of`` tells, from the drifts of a full run, what a controller does where skips do not change the drifts. Changes
    are multiples of 1/64, so that what the model adds to its input comes off again to the last bit."""
    residuals = {s: torch.full((4,), c + 1) for s, c in enumerate(changes)}
    below, above = tau * (1 - 1e-5), tau * (1 + 1e-5)  # a sum at tau is rounded either way
    assume(skips_of(residuals, below) == skips_of(residuals, above))
    times = [float(len(changes) - i) for i in range(len(changes))]
    by_time = dict(zip(times, changes, strict=True))
    x = torch.ones(1, 1, 4)
    model, controller = controlled(replace(CACHE, tau=tau), lambda h, t: torch.full_like(h, by_time[t] + 1))
    run(model, x, times)
    skipped = [any(c.step == s and c.choice == SKIPPED for c in controller.log) for s in range(len(times))]
    assert not skipped[0] and not any(skipped[:2])
    assert "111" not in "".join("01"[s] for s in skipped)
    assert {s for s, yes in enumerate(skipped) if yes} == skips_of(residuals, tau)


def test_a_drifting_residual_is_computed_again() -> None:
    x = torch.ones(1, 2, 4)
    model, controller = controlled(replace(CACHE, tau=0.15), lambda h, t: h * (1 + (1000 - t) / 500))
    run(model, x, TIMES)
    assert 0 < controller.skipped < 0.55
    wild, other = controlled(replace(CACHE, tau=0.3), lambda h, t: h * (-1.0) ** (t // 50))
    run(wild, x, TIMES)
    assert other.skipped == 0


def test_noise_in_the_cache_grows_with_every_reuse() -> None:
    """Eq. 12: a residual with noise eta that is reused N times along a chain adds N eta."""
    x, eta = torch.zeros(1, 1, 4), 2.0**-6
    model, controller = controlled(CACHE, lambda h, _: torch.ones_like(h))
    hidden = x
    for i, t in enumerate(TIMES[:4]):
        hidden = model(hidden, torch.tensor(t))
        if i == 1:
            controller.states[0, 0].deltas["hidden_states"] += eta
    assert controller.log[-1].choice == controller.log[-2].choice == SKIPPED
    assert torch.equal(hidden, torch.full_like(x, 4 + 2 * eta))


def test_a_new_run_and_a_reset_forget() -> None:
    x = torch.ones(1, 2, 4)
    model, controller = controlled(CACHE, lambda h, _: h)
    run(model, x, TIMES[:6])
    assert controller.step == 5 and controller.skipped > 0
    run(model, x, TIMES[:2])  # the time rises: another run
    assert controller.step == 1 and controller.skipped == 0 and len(controller.log) == 2
    run(model, x, TIMES[2:4])
    controller.reset()
    assert controller.step == -1 and not controller.states


def test_a_first_frame_at_time_zero_does_not_stop_the_clock() -> None:
    """Wan 2.2 gives every token a time, and those of a given picture time 0."""
    assert time_of(torch.tensor([[0.0, 0.0, 700.0]])) == 700 and time_of(3) == 3


def test_branches_and_shapes_have_states_of_their_own() -> None:
    text = [1.0]
    model, controller = controlled(CACHE, lambda h, t: h * t * text[0])
    for step, t in enumerate(TIMES[:3]):
        latents_now = torch.ones(1, 2, 4) + step
        for text[0] in (1.0, 7.0):
            model(latents_now, torch.tensor(t))
    assert set(controller.states) == {(0, 0), (1, 0)}
    first, second = (controller.states[b, 0].deltas["hidden_states"] for b in (0, 1))
    assert torch.equal(7 * first, second)
    assert model(torch.ones(1, 3, 4), torch.tensor(TIMES[3])).shape == (1, 3, 4)  # nothing of another shape is reused


def test_streams_come_back_in_their_order() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor, more: int = 0) -> tuple[Tensor, Tensor]:
            return b + 1, a + 2

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Two()])

        def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
            b, a = self.blocks[0](torch.zeros(1, 2, 4), b=torch.ones(1, 3, 4), more=1)
            return a, b

    model = Model()
    controller = attach(model, Controller(CACHE), ["blocks.0"], TWO)
    for t in TIMES[:4]:
        a, b = model(torch.zeros(2), torch.tensor(t))
        assert torch.equal(a, torch.full((1, 2, 4), 2.0)) and torch.equal(b, torch.full((1, 3, 4), 2.0))
    assert controller.skipped > 0


class Decided(nn.Module):
    """A block whose linear asks the controller how its inputs are quantized; it adds a third of them."""

    class Line(nn.Module):
        weights, activations, chooser = SimpleNamespace(name="nvfp4"), object(), None

        def forward(self, x: Tensor) -> Tensor:
            assert self.chooser is not None
            self.chooser(x)
            return x / 3

    def __init__(self) -> None:
        super().__init__()
        self.line = self.Line()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.line(hidden_states)


@pytest.mark.parametrize(
    "policy",
    [
        StepPolicy(fits={}, threshold=0.5, computed=(0, 1, 3, 4, 6), steps=7),
        StepPolicy(fits={}, threshold=0.5, tau=0.1),
    ],
    ids=["schedule", "delta"],
)
def test_a_change_is_one_step_old_or_unknown(policy: StepPolicy) -> None:
    """After a step that was skipped nothing is known of the step before, and inputs are INT8; with a known change of 1/3, which
    is below the threshold, they are NVFP4."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Decided()])

        def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
            return self.blocks[0](hidden_states=hidden_states)

    model = Net()
    controller = attach(model, Controller(replace(policy, fits={"blocks.0.line": (1.0, 0.0)})), ["blocks.0"], ONE)
    for step, t in enumerate(TIMES[:7]):
        for guidance in (0, 1):  # every branch has changes of its own
            model(torch.full((1, 2, 4), 1.0), torch.tensor(t))
            assert (controller.step, controller.branch) == (step, guidance)
    for branch in (0, 1):
        mine = [c for c in controller.log if c.branch == branch]
        skipped = {c.step for c in mine if c.choice == SKIPPED}
        assert 2 in skipped and not {0, 1} & skipped
        made = {c.step: c.choice for c in mine if c.linear}
        assert set(made) == set(range(7)) - skipped
        assert made == {s: WIDE if s == 0 or s - 1 in skipped else NARROW for s in made}
        assert NARROW in made.values()


# ---- the fit -----------------------------------------------------------------------------------------------------


def test_a_planted_line_is_found() -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.rand(500, generator=g, dtype=torch.float64)
    y = 0.4 * x + 0.07 + 0.01 * torch.randn(500, generator=g, dtype=torch.float64)
    (slope, offset), r = least_squares(torch.stack([x, y], 1))
    assert slope == pytest.approx(0.4, rel=0.05) and offset == pytest.approx(0.07, rel=0.05) and r > 0.99
    (slope, offset), r = least_squares(torch.stack([torch.ones(9), y[:9]], 1))
    assert slope == 0 and offset == pytest.approx(float(y[:9].mean())) and math.isnan(r)


def observed(count: int = 400) -> Observer:
    """Ten steps, one block, one linear, whose errors follow from changes; a residual that walks at random."""
    g, seen = torch.Generator().manual_seed(5), Observer()
    for run_number in range(count // 10):
        residual = torch.ones(64)
        for step in range(10):
            change = float(torch.rand((), generator=g))
            residual = residual + 0.3 * torch.rand((), generator=g) * torch.randn(64, generator=g)
            seen.residuals[run_number, 0, 0][step] = residual
            seen.observations.append(
                Observation(
                    run=run_number,
                    step=step,
                    branch=0,
                    block=0,
                    linear="x",
                    change=change if step else None,
                    error=0.1 + change / 2,
                )
            )
    return seen


def test_the_width_asked_for_is_the_share_below_the_threshold() -> None:
    seen = observed()
    last = math.inf
    for width in (4.4, 4.5, 5.0, 6.0, 7.0, 7.9):  # a tenth, the first steps, cannot be NVFP4
        policy = fit(seen, PolicyConfig(width=width, skips=0)).policy
        narrow = sum(s.change is not None and 0.1 + s.change / 2 <= policy.threshold + 1e-9 for s in seen.observations)
        assert 8 - 4 * narrow / len(seen.observations) == pytest.approx(width, abs=0.02)
        assert policy.threshold < last and policy.tau == 0
        last = policy.threshold
    assert fit(seen, PolicyConfig(width=8, skips=0)).policy.threshold == -math.inf
    found = fit(seen, PolicyConfig(width=4, skips=0))
    assert found.policy.threshold < math.inf and found.expected["width"] == pytest.approx(4.4)


def test_inputs_with_outliers_count_as_they_are() -> None:
    """Half of the linears have outliers: 16 bits of them leave no room for INT8 in the others, and the width is what it is."""
    seen = observed()
    seen.observations = [replace(s, linear="xy"[i % 2], peak=30.0 * (i % 2)) for i, s in enumerate(seen.observations)]
    found = fit(seen, PolicyConfig(width=6, skips=0.2))
    assert found.policy.caches and found.expected["width"] > 9.9
    assert fit(seen, PolicyConfig(width=6, skips=0.2, purify=0)).expected["width"] == pytest.approx(6, abs=0.05)


def test_a_branch_that_does_not_run_at_every_step_can_be_fitted() -> None:
    seen = observed(100)
    for step in (5, 6, 8):
        seen.residuals[0, 1, 0][step] = torch.ones(64)
        seen.observations.append(Observation(run=0, step=step, branch=1, block=0, linear="x", change=None, error=0.2))
    assert fit(seen, PolicyConfig(skips=0.3)).expected["skips"] <= 0.3
    found = fit(seen, PolicyConfig(skips=0.3, cache="schedule"))  # of the branches that run at every step
    assert found.policy.steps == 10 and len(found.policy.computed) == 7


def test_a_time_that_comes_again_with_other_latents_is_another_step() -> None:
    """Samplers of higher order repeat times, and half precision rounds neighbours to one."""
    clock, x = Clock(), torch.zeros(4, 100)
    seen = []
    for time, latents_now in ((900, x), (900, x), (900, x + 1), (900, x + 1), (500, x), (999, x)):
        clock.tick(torch.tensor([float(time)]), latents_now)
        seen.append((clock.step, clock.branch))
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (0, 0)]


def test_the_share_of_skips_asked_for_is_not_passed() -> None:
    seen, before = observed(), -1.0
    for share in (0.05, 0.2, 0.4, 0.6):
        found = fit(seen, PolicyConfig(skips=share))
        assert before < found.expected["skips"] <= share and found.expected["skips"] > share - 0.06
        before = found.expected["skips"]


def test_a_policy_survives_json() -> None:
    for policy in (
        StepPolicy(fits={"a": (0.5, 0.1)}, threshold=0.25, tau=0.1, most=2, purify=25.0),
        StepPolicy(fits={}, threshold=-math.inf),
        StepPolicy(fits={}, threshold=math.inf),
    ):
        assert StepPolicy.from_json(json.loads(json.dumps(policy.to_json(), allow_nan=False))) == policy


# ---- one weight, two precisions ----------------------------------------------------------------------------------


def nvfp4(rows: int = 24, columns: int = 64, seed: int = 0) -> Any:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    fmt = FORMATS["nvfp4"]
    return to_codes(w, find_params(w, fmt, torch.float32), fmt)


def test_the_exact_int8_view_is_the_nvfp4_weight() -> None:
    q = nvfp4()
    codes, scale = exact_view(q)
    assert codes.dtype == torch.int8 and int(codes.abs().max()) <= 12
    assert torch.equal((codes.float().unflatten(1, (-1, 16)) * scale[..., None]).flatten(1), dequantize(q))
    x, fmt = torch.randn(7, 64, generator=torch.Generator().manual_seed(1)), ACTIVATION_FORMATS["int8_token"]
    s = token_scale(x, fmt)
    codes_x = round_to_grid(x / s, fmt)
    expected = (codes_x.double() * s.double()) @ dequantize(q).double().T
    found = exact_product(codes_x.to(torch.int8), s, codes, scale)
    assert (found - expected).norm() < 1e-6 * expected.norm()


def test_the_view_by_rows_is_within_one_percent() -> None:
    q = nvfp4(64, 256)
    codes, scale = row_view(q)
    error = (codes.float() * scale - dequantize(q)).norm() / dequantize(q).norm()
    assert 0 < error < 0.01


# ---- a pipeline --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("pipelines") / "wan", steps=6)


class Quiet:
    def start(self, what: str, total: int) -> None: ...
    def step(self, amount: int = 1) -> None: ...


@pytest.fixture(scope="module")
def packed(folder: Path) -> Path:
    out = folder.with_name("packed")
    request = Request(model=str(folder), scheme="6bit", method="gptq", policy={"skips": 0.0}, samples=8)
    assert quantize(request, out, Quiet()).ok
    return out


def latents(
    path: Path, change: Callable[[Any], None] = lambda _: None, **over: Any
) -> tuple[Tensor, Controller | None]:
    pipe = qkit.load(path)
    change(pipe)
    pipe.set_progress_bar_config(disable=True)
    call = {**json.loads((path / "sampling.json").read_text())["call"], **over}
    made = pipe("a red ball moves left", generator=torch.Generator().manual_seed(0), output_type="latent", **call)
    return made.frames, getattr(pipe.transformer, "steps", None)


def with_policy(packed: Path, out: Path, **changes: Any) -> Path:
    shutil.copytree(packed, out)
    file = out / "transformer" / "qkit.json"
    record = json.loads(file.read_text())
    record["diffusion"].update(changes)
    file.write_text(json.dumps(record))
    return out


@pytest.mark.parametrize(("threshold", "inputs", "bits"), [("-inf", "int8_token", 8), ("inf", "nvfp4_dynamic", 4)])
def test_thresholds_without_end_are_static_schemes(
    packed: Path, tmp_path: Path, threshold: str, inputs: str, bits: int
) -> None:
    """The same weights with inputs of one format, to the bit."""

    def static(pipe: Any) -> None:
        for module in pipe.transformer.modules():
            if isinstance(module, QuantLinear):
                module.chooser, module.activations = None, ACTIVATION_FORMATS[inputs]

    folder = with_policy(packed, tmp_path / "stepped", threshold=threshold, tau=0.0)
    found, steps = latents(folder)
    expected, unused = latents(folder, static)
    assert steps is not None and steps.width == bits and unused is not None
    assert not any(c.linear for c in unused.log)
    assert torch.equal(found, expected)


def test_width_falls_as_the_threshold_rises(packed: Path, tmp_path: Path) -> None:
    fits = json.loads((packed / "transformer" / "qkit.json").read_text())["diffusion"]
    found = []
    for i, threshold in enumerate(
        ["-inf", fits["threshold"] * 0.95, fits["threshold"], fits["threshold"] * 1.1, "inf"]
    ):
        _, steps = latents(with_policy(packed, tmp_path / str(i), threshold=threshold, tau=0.0))
        assert steps is not None
        found.append(steps.width)
    assert found == sorted(found, reverse=True) and found[0] == 8 and found[-1] == 4 and len(set(found)) > 3


def test_the_width_asked_for_is_near(packed: Path) -> None:
    _, steps = latents(packed)
    assert steps is not None and 5.5 < steps.width < 6.5 and steps.skipped == 0


def test_a_policy_that_cannot_be_read_is_refused(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="cannot be read"):
        latents(with_policy(packed, tmp_path / "a", kind="other"))


# ---- the transform of inputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [16, 128, 192, 384, 1024])
def test_a_transformed_product_is_the_product(columns: int) -> None:
    g, block = torch.Generator().manual_seed(0), hadamard_block(columns)
    x, w = torch.randn(9, columns, generator=g), torch.randn(7, columns, generator=g)
    found = hadamard(x, block) @ hadamard(w, block).T
    assert block >= 16 and columns % block == 0
    assert (found - x @ w.T).norm() < 1e-5 * (x @ w.T).norm()
    assert torch.allclose(hadamard(hadamard(x, block), block), x, atol=1e-5)


def test_a_scale_and_a_transform_leave_the_product() -> None:
    g = torch.Generator().manual_seed(1)
    x, w = torch.randn(9, 256, generator=g), torch.randn(7, 256, generator=g)
    inputs = InputTransform((torch.rand(256, generator=g) + 0.2).to(torch.bfloat16), 128)
    whole = x @ w.T
    assert (inputs(x) @ inputs.weight(w).T - whole).norm() < 1e-5 * whole.norm()
    assert torch.allclose(inputs.back(inputs(x)), x, atol=1e-5)
    assert torch.allclose(inputs.weight_back(inputs.weight(w)), w, atol=1e-5)


def test_narrow_layers_are_left_alone() -> None:
    x = torch.randn(3, 24)
    assert hadamard_block(24) == 0 and torch.equal(hadamard(x, 0), x)


def test_outlier_channels_are_spread() -> None:
    """The kurtosis of inputs with outlier channels falls, and INT8 inputs gain by it."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    x[:, ::100] *= 30
    flat, fmt = hadamard(x, 128), ACTIVATION_FORMATS["int8_token"]

    def kurtosis(v: Tensor) -> float:
        return float((v**4).mean() / (v**2).mean() ** 2)

    plain, spread = ((quantize_activations(v, fmt) - v).norm() / v.norm() for v in (x, flat))
    assert kurtosis(flat) < kurtosis(x) / 5 and spread < plain / 2


@pytest.mark.parametrize(("scheme", "method"), [("w4a8", "hadamard+gptq"), ("6bit", "hadamard")])
def test_a_pipeline_with_transformed_inputs(folder: Path, tmp_path: Path, scheme: str, method: str) -> None:
    """Packed and proven, and no further from the original than rounding can explain."""
    request = Request(model=str(folder), scheme=scheme, method=method, samples=8)
    report = quantize(request, tmp_path / "out", Quiet())
    assert report.ok
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "qkit" and set(config["rotated"].values()) == {128}
    (found, _), (original, _) = latents(tmp_path / "out"), latents(folder)
    assert 0 < (found - original).norm() < 0.35 * original.norm()


def test_transformed_inputs_are_for_diffusion_transformers() -> None:
    with pytest.raises(Unsupported, match="in diffusion transformers"):
        prepare(Request(model="tiny-llama", scheme="w4a8", method="hadamard"))
    with pytest.raises(UsageError, match="unknown method"):
        prepare(Request(model="tiny-llama", scheme="w4a8", method="hadamar"))


def test_a_threshold_counts_what_follows_a_skip_as_int8() -> None:
    """A residual that never changes is skipped at two of three steps; of the four that are computed, the first knows no change,
    and two follow a skip: one alone can be NVFP4."""
    seen = Observer()
    for step in range(10):
        seen.residuals[0, 0, 0][step] = torch.ones(4)
        change = None if step == 0 else 0.1 + 0.05 * step
        seen.observations.append(
            Observation(
                run=0, step=step, branch=0, block=0, linear="a", change=change, error=0.05 * step, time=10.0 - step
            )
        )
    found = fit(seen, PolicyConfig(width=6, skips=0.6))
    assert skips_of(seen.residuals[0, 0, 0], found.policy.tau) == {2, 3, 5, 6, 8, 9}
    assert found.expected == {"skips": 0.6, "width": (3 * 8 + 4) / 4}
    assert found.policy.threshold == pytest.approx(0.05)  # what is expected at step 1


# ---- a schedule --------------------------------------------------------------------------------------------------


def test_the_best_groups_are_those_of_an_exhaustive_search() -> None:
    features = torch.randn(12, 40, generator=torch.Generator().manual_seed(7)).cumsum(0)
    costs = group_costs(features)

    def cost(starts: tuple[int, ...]) -> float:
        ends = [*starts[1:], 12]
        return sum(float(costs[a, b - 1]) for a, b in zip(starts, ends, strict=True))

    every = [(0, *rest) for rest in combinations(range(1, 12), 3)]
    fitting = [s for s in every if all(b - a <= 6 for a, b in zip(s, (*s[1:], 12), strict=True))]
    best = best_groups(costs, 4, longest=6)
    assert best in fitting and cost(best) == pytest.approx(min(map(cost, fitting)))
    assert cost(best) < cost((0, 3, 6, 9)) and best_groups(costs, 12) == tuple(range(12))
    with pytest.raises(ValueError, match="12 steps in 2 groups"):
        best_groups(costs, 2)


def test_a_residual_that_only_grows_is_reused_without_error() -> None:
    """Residuals of two blocks are multiples of the last computed ones: the gains are those multiples, and the run is the full
    one, where without gains it is not."""
    growth = [dict(zip(TIMES, [1 + rate * s for s in range(20)], strict=True)) for rate in (0.05, -0.03)]
    changes = [lambda h, t, g=g: torch.full_like(h, 0.3 * g[t]) for g in growth]
    computed = tuple(s for s in range(20) if s % 3 == 0)
    residuals = {
        (0, 0, b): {s: torch.full((5,), 0.3 * g[t]) for s, t in enumerate(TIMES)} for b, g in enumerate(growth)
    }
    gains = schedule_gains(residuals, computed, 20)
    assert set(gains) == set(range(20)) - set(computed) and gains[4][0] == pytest.approx(1.2 / 1.15, abs=1e-6)
    policy = StepPolicy(fits={}, threshold=-math.inf, computed=computed, steps=20, gains=gains)
    assert StepPolicy.from_json(json.loads(json.dumps(policy.to_json()))) == policy
    x, full = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(3)), Toy(*changes)
    expected = torch.stack(run(full, x, TIMES))

    def error(p: StepPolicy) -> float:
        return float((torch.stack(run(controlled(p, *changes)[0], x, TIMES)) - expected).abs().max())

    assert error(policy) < 1e-5 < 1e-2 < error(replace(policy, gains={}))


def test_a_schedule_is_followed_and_does_not_stretch(folder: Path, tmp_path: Path) -> None:
    policy = {"width": 6.0, "skips": 0.34, "cache": "schedule"}
    assert quantize(Request(model=str(folder), scheme="6bit", policy=policy, samples=8), tmp_path / "out", Quiet()).ok
    recorded = json.loads((tmp_path / "out" / "transformer" / "qkit.json").read_text())["diffusion"]
    assert recorded["steps"] == 6 and len(recorded["computed"]) == 4 and recorded["computed"][0] == 0
    assert {int(s) for s in recorded["gains"]} == set(range(6)) - set(recorded["computed"])
    found, steps = latents(tmp_path / "out")
    assert steps is not None and found.isfinite().all() and steps.skipped == pytest.approx(1 / 3)
    assert {c.step for c in steps.log if c.choice == SKIPPED} == set(range(6)) - set(recorded["computed"])
    with pytest.raises(Unsupported, match="num_inference_steps=6"):
        latents(tmp_path / "out", num_inference_steps=7)


# ---- what an error is worth ------------------------------------------------------------------------------------------


def test_errors_that_count_twice_are_spared() -> None:
    """Of equal errors, those at steps and in blocks that move the end of a run most are INT8; in between, times interpolate."""
    seen, uniform = Observer(), 0.1
    for run_number, step, block in product(range(3), range(8), range(2)):
        seen.residuals[run_number, 0, block][step] = torch.ones(4)
        time = 1000.0 - 100 * step
        seen.observations.append(
            Observation(
                run=run_number,
                step=step,
                branch=0,
                block=block,
                linear=f"b{block}",
                change=0.5 + 0.01 * step,
                error=uniform,
                peak=0.0,
                time=time,
            )
        )
    times = tuple((1000.0 - 100 * s, 1.0 + s) for s in reversed(range(8)))
    found = fit(seen, PolicyConfig(width=6, skips=0, weigh=True), None, Influence(times, (1.0, 10.0))).policy
    assert (
        found.weight(0, 1000.0) == 1 and found.weight(1, 300.0) == 80 and found.weight(0, 950.0) == pytest.approx(1.5)
    )
    assert found.weight(0, 5000.0) == 1 and found.weight(7, None) == 1
    narrow = {
        (s.block, s.step)
        for s in seen.observations
        if found.predicted(s.linear, s.change, s.block, s.time) <= found.threshold
    }
    assert narrow == {(0, s) for s in range(8)}  # half of all
    assert StepPolicy.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found
    static = fit(
        seen, PolicyConfig(kind="static", width=6, skips=0, weigh=True), None, Influence(times, (1.0, 10.0))
    ).policy
    assert static.by_time == () and static.predicted("b0", None) <= static.threshold < static.predicted("b1", None)
    plain = fit(seen, PolicyConfig(width=6, skips=0)).policy
    assert plain.by_time == () and plain.weight(1, 300.0) == 1


def test_influence_is_what_a_toy_does() -> None:
    """Two blocks add c * NVFP4(x) to a latent that does not change: an error in the second counts three times as much, one at a
    step of twice the length twice."""

    class Line(nn.Module):
        weights, activations, chooser = SimpleNamespace(name="nvfp4"), object(), None

        def __init__(self, gain: float) -> None:
            super().__init__()
            self.gain = gain

        def product(self, x: Tensor, activations: Any) -> Tensor:
            return x if activations is None else 1.5 * x

        def forward(self, hidden_states: Tensor) -> Tensor:
            assert self.chooser is not None
            return hidden_states + self.gain * self.product(torch.ones_like(hidden_states), self.chooser(hidden_states))

    class Wrapped(nn.Module):
        def __init__(self, gain: float) -> None:
            super().__init__()
            self.line = Line(gain)

        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.line(hidden_states)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Wrapped(1.0), Wrapped(3.0)])

        def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
            for block in self.blocks:
                hidden_states = block(hidden_states)
            return hidden_states

    class Pipe:
        transformer = Net()
        scheduler = SimpleNamespace(timesteps=[3.0, 2.0, 1.0])

        def __call__(self, prompt: str, generator: Any, output_type: str) -> Any:
            x = torch.zeros(1, 4)
            for t, length in zip(self.scheduler.timesteps, (1.0, 2.0, 1.0), strict=True):
                x = x + length * self.transformer(hidden_states=torch.zeros(1, 4), timestep=torch.tensor([t]))
            return SimpleNamespace(frames=x)

    pipe, ruled = Pipe(), RuleController()
    attach(pipe.transformer, ruled, ["blocks.0", "blocks.1"], ONE)
    seen = [
        Observation(run=0, step=s, branch=0, block=b, linear=f"b{b}", change=0.5, error=0.5, peak=0.0, time=3.0 - s)
        for s, b in product(range(3), range(2))
    ]
    found = influence_of(pipe, ruled, seen, [("a", 0)], {}, lambda: None)
    assert found.by_block == pytest.approx((0.5, 1.5))
    assert found.by_time == tuple((t, pytest.approx(w)) for t, w in ((1.0, 0.75), (2.0, 1.5), (3.0, 0.75)))


def test_a_weighed_policy_is_followed(folder: Path, tmp_path: Path) -> None:
    policy = {"width": 6.0, "skips": 0.0, "weigh": True}
    assert quantize(Request(model=str(folder), scheme="6bit", policy=policy, samples=8), tmp_path / "out", Quiet()).ok
    recorded = json.loads((tmp_path / "out" / "transformer" / "qkit.json").read_text())["diffusion"]
    assert len(recorded["by_time"]) == 6 and len(recorded["by_block"]) == 2
    assert sum(w for _, w in recorded["by_time"]) == pytest.approx(6, abs=1e-4)
    _, steps = latents(tmp_path / "out")
    assert steps is not None and 4.5 < steps.width < 7.5
    assert {c.choice for c in steps.log if c.linear} == {"nvfp4_dynamic", "int8_token"}
