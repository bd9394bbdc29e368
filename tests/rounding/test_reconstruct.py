"""Learned rounding: where it begins, what it may change, and what it is for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Quiet, Stops
from torch import Tensor, nn

from qkit.calibration.block_calls import Call
from qkit.calibration.statistics import Rows
from qkit.errors import Unsupported, UsageError
from qkit.families.blocks import Linear
from qkit.rounding.block import Settings, reconstruct
from qkit.rounding.learned_weight import LearnedWeight
from qkit.runtime.loading import load, load_tokenizer
from qkit.system.parallel import Workers, workers
from qkit.tensor.formats import FORMATS, GGUF_FORMATS, Format
from qkit.tensor.input_transform import PLAIN, InputTransform
from qkit.tensor.qtensor import (
    QTensor,
    code_range,
    codes_to_grid,
    dequantize,
    effective_minimum,
    effective_scale,
    find_params,
    grid_spacing,
    grid_to_codes,
    round_to_grid,
    tiles,
    untile,
)
from qkit.tensor.qtensor import quantize as rounded
from qkit.tensor.sparse import split
from qkit.workflows.quantize import Request, prepare, quantize

NAMES = ("int2", "int3", "int4", "int8", "int4_asym", "nvfp4", "mxfp4", "fp8")
ALL = [*(FORMATS[n] for n in NAMES if n in FORMATS), *GGUF_FORMATS.values()]
SHAPE = (24, 256)  # a super-block wide
INPUTS = [PLAIN, InputTransform(torch.linspace(0.5, 2, SHAPE[1]), 128)]


def weight(seed: int = 0, shape: tuple[int, int] = SHAPE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(q: QTensor, seed: int = 1) -> QTensor:
    """Every third code is one of the grid's other values next to it, as a solver may choose."""
    grid = codes_to_grid(torch.arange(16, dtype=torch.uint8), q.format) if q.format.kind == "fp4" else None
    values = codes_to_grid(q.codes, q.format)
    chosen = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)) < 0.33
    if grid is not None:
        order = grid.unique()
        at = torch.bucketize(values, order)
        other = order[(at + 1).clamp_max(len(order) - 1)]
    elif q.format.kind in ("int", "uint"):
        other = (values + 1).clamp(*code_range(q.format))
    elif q.format.kind == "nl4":
        other = codes_to_grid((q.codes + 1).clamp_max(15), q.format)
    else:
        other = (values * 1.125).to(torch.float8_e4m3fn).float()
    return QTensor(grid_to_codes(torch.where(chosen, other, values), q.format), q.params, q.format)


def solved(fmt: Format, w: Tensor) -> QTensor:
    return moved(rounded(w, find_params(w, fmt, torch.bfloat16), fmt))


@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.name)
@pytest.mark.parametrize("inputs", INPUTS, ids=["plain", "turned"])
def test_it_begins_where_the_solver_ended(fmt: Format, inputs: InputTransform) -> None:
    q = solved(fmt, inputs.weight(weight()))
    x = LearnedWeight(Linear(name="a", param="a.weight", shape=SHAPE), inputs.weight(weight()), q, inputs)
    begun = x.begin()
    torch.testing.assert_close(x.dense(*begun), inputs.weight_back(dequantize(q)), rtol=1e-5, atol=1e-6)
    found = x.finish(*begun)
    assert torch.equal(codes_to_grid(found.codes, fmt), codes_to_grid(q.codes, fmt))
    assert torch.equal(found.params.scale.view(torch.uint8), q.params.scale.view(torch.uint8))
    # What rounding alone would give needs no offset.
    plain = rounded(x.weight, q.params, fmt)
    offset, _ = LearnedWeight(x.linear, x.weight, plain, inputs).begin()
    assert float(offset.abs().max()) == 0.0


def plainly(x: LearnedWeight, offset: Tensor, factor: Tensor) -> Tensor:
    """``LearnedWeight.dense`` with gradients that pass its rounding."""
    low, high = code_range(x.q.format)
    base = effective_scale(x.q.params, x.q.format)[..., None]
    stored = effective_scale(x.finish(offset.detach(), factor.detach()).params, x.q.format)[..., None]
    scale = base * factor + (stored - base * factor).detach()
    zero = 0.0 if x.q.params.zero is None else x.q.params.zero.float()[..., None]
    minimum = effective_minimum(x.q.params)
    below = 0.0 if minimum is None else minimum[..., None]
    place = (tiles(x.weight, x.q.format) - below) / scale + zero
    moved = (place + offset * grid_spacing(place.detach().clamp(low, high), x.q.format)).clamp(low, high)
    grid = moved + (round_to_grid(moved.detach(), x.q.format) - moved).detach() - zero
    return x.inputs.weight_back(untile(grid * scale + below, x.q.format, x.q.shape))


@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.name)
@pytest.mark.parametrize("inputs", INPUTS, ids=["plain", "turned"])
def test_slopes_are_the_gradients(fmt: Format, inputs: InputTransform) -> None:
    """Up to what they are multiplied by, which is above zero and the same for a tile."""
    x = LearnedWeight(
        Linear(name="a", param="a.weight", shape=SHAPE),
        inputs.weight(weight()),
        solved(fmt, inputs.weight(weight())),
        inputs,
    )
    offset, factor = x.begin()
    made = torch.Generator().manual_seed(3)
    offset += 0.3 * (torch.rand(offset.shape, generator=made) - 0.5)
    factor *= 1 + 0.2 * (torch.rand(factor.shape, generator=made) - 0.5)
    slope = torch.randn(*SHAPE, generator=made)
    leaves = offset.clone().requires_grad_(), factor.clone().requires_grad_()
    dense = plainly(x, *leaves)
    torch.testing.assert_close(x.dense(offset, factor), dense.detach(), rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(dense, leaves, slope)
    base = effective_scale(x.q.params, fmt)[..., None].abs()
    found = x.gradients(offset, factor, slope)
    torch.testing.assert_close(found[1] * base, expected[1], rtol=1e-3, atol=1e-4)
    assert float((found[0].sign() != expected[0].sign()).float().mean()) < 1e-3
    if fmt.scale != "e8m0":  # where a factor reaches no other exponent
        assert not torch.equal(x.finish(offset, factor).params.scale.float(), x.q.params.scale.float())


def test_a_sparse_part_stays() -> None:
    w, fmt = weight(), FORMATS["int3"].with_group(32)
    dense, sparse = split(w, 40, torch.bfloat16)
    q = replace(solved(fmt, dense), sparse=sparse)
    x = LearnedWeight.of(Linear(name="a", param="a.weight", shape=SHAPE), w, q, PLAIN)
    begun = x.begin()
    torch.testing.assert_close(x.dense(*begun), dequantize(q), rtol=1e-5, atol=1e-6)
    assert float(begun[0].abs().max()) < 2 and torch.equal(dequantize(x.finish(*begun)), dequantize(q))


@pytest.mark.parametrize("name", ["nvfp4", "fp8"])
def test_spacing_is_the_distance_of_neighbours(name: str) -> None:
    fmt = FORMATS[name]
    codes = torch.arange(8 if name == "nvfp4" else 127, dtype=torch.uint8)
    values = codes_to_grid(codes if name == "nvfp4" else codes.view(torch.float8_e4m3fn), fmt)
    assert torch.equal(grid_spacing(values[:-1], fmt), values.diff())


class Toy(nn.Module):
    """A block: two linears with something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(nn.functional.silu(self.up(hidden)))


@pytest.mark.parametrize(
    "fmt",
    [FORMATS["int3"].with_group(32), FORMATS["nvfp4"], *map(GGUF_FORMATS.get, ("iq4_nl", "q4_1"))],
    ids=lambda f: f.name,
)
def test_a_block_comes_closer_to_what_it_gave(fmt: Format, tmp_path) -> None:
    """On rows that nothing was learned from; the same again is the same; no step is worse than the solver's result."""
    torch.manual_seed(0)
    block = Toy().requires_grad_(False)
    # Inputs in a few directions: rounding of the others does not matter, and that is what is learned.
    rows = torch.randn(40, 16, 4) @ torch.randn(4, 32)
    aims = block(rows)
    learners = []
    for name, module in block.named_children():
        q = rounded(module.weight.data, find_params(module.weight.data, fmt, torch.bfloat16), fmt)
        learners.append(
            LearnedWeight(
                Linear(name=name, param=f"{name}.weight", shape=tuple(module.weight.shape)),
                module.weight.data,
                q,
                PLAIN,
            )
        )

    def on_disk(name: str, what: Tensor) -> Rows:
        (tmp_path / name).write_bytes(what.contiguous().numpy().tobytes())
        return Rows(
            path=tmp_path / name, count=len(what), tokens=16, hidden=32, dtype=torch.float32, good=[True] * len(what)
        )

    given = on_disk("in", rows[:32]), on_disk("out", aims[:32])

    def learn(steps: int, pool: Workers) -> tuple[list[QTensor], float, float]:
        return reconstruct(block, learners, *given, Call((), {}), Settings(steps, 4, 0.0, 0), pool, lambda: None)

    with workers(1) as one, workers(3) as three:
        found, before, after = learn(60, one)
        again = learn(60, three)[0]
        unchanged, first, last = learn(0, one)
    assert after < before / 2
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(found, again, strict=True))

    def error(made: list[QTensor]) -> float:
        weights = {x.linear.param: dequantize(q) for x, q in zip(learners, made, strict=True)}
        return float((torch.func.functional_call(block, weights, (rows[32:],)) - aims[32:]).square().mean())

    assert error(found) < error([x.q for x in learners]) / 2
    assert first == last == before and all(
        torch.equal(q.codes, x.q.codes) for q, x in zip(unchanged, learners, strict=True)
    )


# ---- whole runs --------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tiny, tmp_path: Path) -> Request:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{i * i % 97} and" for i in range(4000)))
    return Request(
        model=str(tiny("llama", num_hidden_layers=3)),
        scheme="w3a16",
        method="gptq+signround",
        group_size=32,
        calib=text,
        samples=32,
        seqlen=32,
        options={"steps": 24, "batch": 4},
        threads=1,
    )


def solved_alone(asked: Request, folder: Path) -> Path:
    """The same without learned rounding."""
    method = asked.method.removesuffix("+signround") if "+" in asked.method else "rtn"
    quantize(replace(asked, method=method, options={}), folder / "alone", Quiet())
    return folder / "alone"


def logits_error(out: Path, asked: Request) -> float:
    """Of a packed model on rows like those of calibration, against the original."""
    ids = load_tokenizer(asked.model)(asked.calib.read_text()[3000:9000], return_tensors="pt")["input_ids"][:, :512]
    ours, true = (load(p, dtype=torch.float32)(ids.view(-1, 32)).logits for p in (out, asked.model))
    return float((ours - true).square().mean())


def sums(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("*.safetensors")}


def test_every_block_comes_closer_and_nothing_depends_on_the_workers(asked: Request, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert quantize(asked, out, Quiet()).ok
    journal = [json.loads(x) for x in (tmp_path / "out.job" / "journal.jsonl").read_text().splitlines()]
    errors = [entry["block_error"] for entry in journal]
    assert len(errors) == 3 and all(after <= before for before, after in errors)
    assert sum(after for _, after in errors) < 0.97 * sum(before for before, _ in errors)
    assert logits_error(out, asked) < 0.97 * logits_error(solved_alone(asked, tmp_path), asked)
    other = tmp_path / "other"
    quantize(replace(asked, threads=3), other, Quiet())
    assert sums(other) == sums(out)
    stopped = tmp_path / "stopped"
    for phases in (9, 4):
        with pytest.raises(KeyboardInterrupt):
            quantize(asked, stopped, Stops(phases))
    quantize(asked, stopped, Quiet())
    assert sums(stopped) == sums(out)


@pytest.mark.parametrize("changes", [{"scheme": "w4a8"}, {"scheme": "nvfp4", "group_size": None}, {"method": "awq+signround"},
                                     {"method": "signround", "outliers": 1.0}], ids=str)  # fmt: skip
def test_with_activations_other_transforms_and_sparse_parts(asked: Request, tmp_path: Path, changes) -> None:
    assert quantize(replace(asked, **changes), tmp_path / "out", Quiet()).ok
    journal = [json.loads(x) for x in (tmp_path / "out.job" / "journal.jsonl").read_text().splitlines()]
    before, after = (sum(entry["block_error"][i] for entry in journal) for i in (0, 1))
    assert after < before
    made = replace(asked, **changes)
    assert logits_error(tmp_path / "out", made) < logits_error(solved_alone(made, tmp_path), made)


def test_a_block_that_a_rule_leaves(asked: Request, tmp_path: Path) -> None:
    rules = ({"match": "model.layers.1.*", "skip": "asked for"},)
    assert quantize(replace(asked, method="signround", rules=rules, options={"steps": 2}), tmp_path / "out", Quiet()).ok
    journal = [json.loads(x) for x in (tmp_path / "out.job" / "journal.jsonl").read_text().splitlines()]
    assert ["block_error" in entry for entry in journal] == [True, False, True]


def test_rows_of_a_pipeline(tmp_path: Path) -> None:
    """They are of any shape, and run one by one."""
    pytest.importorskip("diffusers", reason="needs diffusers: pip install 'qkit[diffusion]'")
    from tiny_dits import make_pipeline

    source = make_pipeline(tmp_path / "wan", steps=3)
    request = Request(
        model=str(source),
        scheme="w4a8",
        method="signround",
        group_size=32,
        samples=12,
        options={"steps": 12, "rate": 0.05},
        threads=2,
    )
    assert quantize(request, tmp_path / "out", Quiet()).ok
    journal = [json.loads(x) for x in (tmp_path / "out.job" / "journal.jsonl").read_text().splitlines()]
    before, after = (sum(entry["block_error"][i] for entry in journal) for i in (0, 1))
    assert after < before


def test_towers_keep_what_the_solver_made(vlm, tmp_path: Path) -> None:
    """A projector gives rows of another shape than it takes; the language model behind it is learned."""
    request = Request(
        model=str(vlm("llava", processor=True)),
        scheme="w4a16",
        method="signround",
        samples=6,
        options={"steps": 2, "batch": 2},
        threads=1,
        targets={"vision": "w4a16", "projector": "w4a16"},
    )
    assert quantize(request, tmp_path / "out", Quiet()).ok
    journal = [json.loads(x) for x in (tmp_path / "out.job" / "journal.jsonl").read_text().splitlines()]
    learned = ["block_error" in entry for entry in journal]
    assert learned == sorted(learned) and learned[-1] and not learned[0]


def test_effort_is_a_number_of_steps(asked: Request) -> None:
    def steps(request: Request) -> int:
        found = {p.options["steps"] for p in prepare(request).plan.linears.values()}
        return found.pop() if len(found) == 1 else 0

    bare = replace(asked, options={})
    fast, default, best = (steps(replace(bare, effort=e)) for e in ("fast", "default", "best"))
    assert fast < default == steps(bare) < best
    assert steps(replace(bare, effort="best", options={"steps": 7})) == 7
    with pytest.raises(UsageError, match="--effort is for learned rounding, and method 'gptq' has none"):
        prepare(replace(bare, method="gptq", effort="fast"))


def test_the_forecast_counts_what_learning_takes(asked: Request) -> None:
    phases = ("learned rounding", "updates of learned rounding")

    def learning(**options: int) -> float:
        operations = prepare(replace(asked, options=options)).forecast.operations
        return sum(operations[phase] for phase in phases)

    assert learning(steps=40, batch=2) == 4 * learning(steps=10, batch=2)
    assert 1.8 < learning(steps=10, batch=4) / learning(steps=10, batch=2) < 2
    without = prepare(replace(asked, method="rtn", options={})).forecast.operations
    assert all(without[phase] == 0 for phase in phases)


def test_bad_input(asked: Request, tiny) -> None:
    with pytest.raises(Unsupported, match="fused experts: use gptq"):
        prepare(replace(asked, model=str(tiny("mixtral"))))
    with pytest.raises(UsageError, match="option 'steps': expected 1 or more, found 0"):
        prepare(replace(asked, options={"steps": 0}))
