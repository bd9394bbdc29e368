"""What a run of a skeleton shows of the residual stream, and rotations and scales of models that nobody declared."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import logits, relative
from torch import nn

import qkit
from qkit.calibration.block_calls import NotOneAfterAnother
from qkit.engine import block_step, run
from qkit.engine.proof import prove_rotation, unproved_groups
from qkit.errors import Unsupported
from qkit.families.materialize import load_block, release
from qkit.families.norms import commutes_with_rotations, norm_offset
from qkit.families.stream import Feed, Stream
from qkit.families.stream_trace import StreamTrace
from qkit.transforms.rotate import check_rotatable, rotate, rotated_parameters
from qkit.transforms.scales import foldable
from qkit.transforms.state import BlockState
from qkit.workflows.quantize import Request, open_structure, prepare

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import sweep_configs

ROTATED = [
    "granite",
    "gemma",
    "gpt_oss",
    "granitemoe",
    "llama4_text",
    "qwen3_next",
    "falcon_h1",
    "phi3",
    "nanochat",
    "mamba2",
]
TOKENS = torch.randint(5, 60, (2, 16), generator=torch.Generator().manual_seed(3))


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Block(nn.Module):
    """One block and its head; ``step`` is what happens between the block's norm and the sum."""

    def __init__(self, step) -> None:
        super().__init__()
        self.table, self.norm, self.up, self.down = nn.Embedding(16, 8), RMSNorm(), nn.Linear(8, 12), nn.Linear(12, 8)
        self.last, self.head, self.part, self.step = RMSNorm(), nn.Linear(8, 16), nn.Linear(4, 8), step

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        return self.head(self.last(self.step(self, x)))


def watched(step) -> Stream:
    """What the trace finds."""
    with torch.device("meta"):
        model = Block(step)
    trace = StreamTrace(model, "table")
    handles = trace.watch(model)
    with torch.inference_mode(), trace.dispatch_watch, trace:
        model(torch.zeros(1, 4, dtype=torch.long, device="meta"))
    for handle in handles:
        handle.remove()
    return trace.finish((), True)


def test_what_reads_and_writes_the_stream():
    found = watched(lambda m, x: x + m.down(torch.nn.functional.relu(m.up(m.norm(x)))) * 0.5)
    assert found.against == "" and found.table == "table.weight"
    assert found.reads == {"up.weight": "norm", "head.weight": "last"}
    assert found.writes == {"down.weight": "down.bias"}
    assert found.offsets == {"norm": 0.0, "last": 0.0}
    assert {k: f.source for k, f in found.feeds.items()} == {"down.weight": "up.weight"}
    assert found.feeds["down.weight"].head_pattern(12) and not found.feeds["down.weight"].mixes


def _written_into(m, x):
    h = m.norm(x).clone()
    h[..., :2] = 0
    return x + m.down(m.up(h))


def _used_twice(m, x):
    y = m.down(m.up(m.norm(x)))
    return x + y + m.down(m.up(m.norm(y)))


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (
            lambda m, x: x + m.last(m.down(m.up(m.norm(x)))),
            "added to the residual stream that no linear layer writes",
        ),
        (lambda m, x: x * m.norm.weight + m.down(m.up(m.norm(x))), "operator mul reads the residual stream"),
        (lambda m, x: x + m.down(m.up(m.norm(x) * m.norm.weight)), "operator mul reads what leaves norm"),
        (lambda m, x: x.flip(-1) + m.down(m.up(m.norm(x))), "operator flip reads the residual stream"),
        (_written_into, "operator setitem reads what leaves norm"),
        (_used_twice, "read elsewhere, too|multiplies more than once|reads what leaves"),
        (lambda m, x: m.norm(x) + m.down(m.up(m.norm(x))), "added to what leaves norm that"),
        (lambda m, x: torch.relu(x + m.down(m.up(m.norm(x)))), "operator relu reads the residual stream"),
    ],
)
def test_what_a_rotation_would_change_is_seen(step, why):
    found = watched(step)
    assert found.against and re.search(why, found.against)


@pytest.mark.parametrize(
    "step",
    [
        lambda m, x: x + m.down(torch.nn.functional.gelu(m.up(m.norm(x)))),
        lambda m, x: x + m.down(m.up(m.norm(x)).clamp(max=1)),
        lambda m, x: x + m.down((h := m.up(m.norm(x))) * h),
        lambda m, x: x + m.down(m.up(m.norm(x)) + 1),
    ],
)
def test_a_scale_passes_through_nothing_but_products(step):
    assert not watched(step).feeds


def test_heads_of_values_are_followed_through_attention(tmp_path):
    """Values of two heads, each read by two heads of the output."""
    sweep_configs.save("causal", "granite", tmp_path)
    structure = open_structure(str(tmp_path))
    stream = structure.stream.of(structure.blocks[0].path)
    config = structure.model.config
    assert config.num_key_value_heads < config.num_attention_heads
    head = config.hidden_size // config.num_attention_heads
    assert stream.values == ("self_attn.v_proj.weight", "self_attn.o_proj.weight", head)
    sources = {g.declared.linears: g.declared.source for g in structure.blocks[0].groups}
    assert sources[("self_attn.o_proj",)] == "self_attn.v_proj" and sources[("mlp.down_proj",)] == "mlp.up_proj"


def rotated(folder):
    """The model in float32 with rotated weights, and the plain one."""
    structure = open_structure(str(folder))
    check_rotatable(structure)
    kind = type(structure.model)
    model, plain = (kind.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2))
    with torch.no_grad():
        for block in structure.blocks:
            state = BlockState(structure=structure, block=block, module=load_block(structure, block, torch.float32))
            rotate(state, {}, 0)
            model.get_submodule(block.path).load_state_dict(state.module.state_dict())
            release(state.module)
        for name, value in rotated_parameters(structure, 0).items():
            model.get_submodule(name.rpartition(".")[0]).weight = nn.Parameter(value)
    return structure, model, plain


@pytest.mark.parametrize("name", ROTATED)
def test_a_rotation_of_a_model_that_nobody_declared_changes_nothing(name, tmp_path):
    """Factors of the stream, (1 + weight), routers, transposed experts with biases, hybrids, fused q/k/v."""
    sweep_configs.save("causal", name, tmp_path, torch.float32)
    structure, model, plain = rotated(tmp_path)
    assert relative(logits(model, TOKENS), logits(plain, TOKENS)) < 2e-5
    assert prove_rotation(structure, 0) >= 1


def test_the_proof_finds_a_layer_that_was_forgotten(tmp_path):
    sweep_configs.save("causal", "granite", tmp_path)
    structure = open_structure(str(tmp_path))
    del structure.stream.reads["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(Unsupported, match=r"rotating model.layers.0 changes what it returns by .*expected: not at all"):
        prove_rotation(structure, 0)


def test_a_rotated_mixture_of_experts_is_packed_and_loads(tmp_path):
    model = sweep_configs.save("causal", "gpt_oss", tmp_path / "model")
    qkit.quantize(model=model, out=tmp_path / "out", scheme="w8a16", method="rotate+rtn")
    packed, plain = (qkit.load(path, dtype=torch.float32) for path in (tmp_path / "out", model))
    assert relative(logits(packed, TOKENS), logits(plain, TOKENS)) < 0.05


def test_a_source_that_does_not_feed_a_group_is_not_scaled(tmp_path, monkeypatch):
    """A wrong source is found on the block, before a scale is folded into it, and the function stays."""
    model = sweep_configs.save("causal", "granite", tmp_path / "model")
    wrong, found = {"self_attn.o_proj": "self_attn.k_proj", "mlp.down_proj": "mlp.gate_proj"}, []

    def misled(state, rows, call):
        groups = tuple(
            replace(g, declared=replace(g.declared, source=wrong.get(g.linears[0].owner, g.declared.source)))
            for g in state.block.groups
        )
        state.block = replace(state.block, groups=groups)
        found.append(unproved_groups(state, rows, call))
        return found[-1]

    monkeypatch.setattr(block_step, "unproved_groups", misled)
    errors = {}
    for method in ("rtn", "awq"):
        out = tmp_path / method
        qkit.quantize(model=model, out=out, scheme="w8a16", method=method, samples=4, seqlen=32)
        packed, plain = (qkit.load(path, dtype=torch.float32) for path in (out, model))
        errors[method] = relative(logits(packed, TOKENS), logits(plain, TOKENS))
    assert len(found) == 4 and all({n.rpartition(".")[2] for n in keys} == {"o_proj", "down_proj"} for keys in found)
    assert errors["awq"] < 1.2 * errors["rtn"]


def test_values_that_enter_the_stream_elsewhere_keep_it_from_being_rotated(tmp_path):
    sweep_configs.save("image-text", "gemma3", tmp_path)
    with pytest.raises(Unsupported, match=r"in gemma3.*, values of the vision enter the stream"):
        check_rotatable(open_structure(str(tmp_path)))


@pytest.mark.parametrize("name", ["gpt2", "hy_v3", "hy_v4"])
def test_scales_are_folded_where_the_proof_holds(name, tmp_path, monkeypatch):
    """Transposed matrices, repeated heads of values, and blocks that keep a part of their weights in float32."""
    model, found = sweep_configs.save("causal", name, tmp_path / "model"), []

    def noted(state, rows, call):
        found.append((sum(foldable(state, g) for g in state.block.groups), unproved_groups(state, rows, call)))
        return found[-1][1]

    monkeypatch.setattr(block_step, "unproved_groups", noted)
    qkit.quantize(model=model, out=tmp_path / "out", scheme="w8a16", method="awq", samples=4, seqlen=32)
    assert all(count and not wrong for count, wrong in found)
    packed, plain = (qkit.load(path, dtype=torch.float32) for path in (tmp_path / "out", model))
    assert relative(logits(packed, TOKENS), logits(plain, TOKENS)) < 0.15


def test_the_proof_finds_a_norm_that_was_forgotten_outside_the_blocks(tmp_path):
    sweep_configs.save("causal", "granite", tmp_path)
    structure = open_structure(str(tmp_path))
    structure.stream.reads.update({n: "" for n in structure.stream.outer_reads(structure.paths)})
    with pytest.raises(
        Unsupported, match=r"rotating the output head changes what it returns by .*expected: not at all"
    ):
        prove_rotation(structure, 0)


def test_a_rotation_is_proved_before_anything_is_written(tmp_path, monkeypatch):
    model, finish = sweep_configs.save("causal", "granite", tmp_path / "model"), StreamTrace.finish

    def forgetful(trace, blocks, whole):
        found = finish(trace, blocks, whole)
        del found.reads["model.layers.0.mlp.up_proj.weight"]
        return found

    monkeypatch.setattr(StreamTrace, "finish", forgetful)
    with pytest.raises(Unsupported, match=r"rotating model.layers.0 changes what it returns"):
        qkit.quantize(model=model, out=tmp_path / "out", scheme="w8a16", method="rotate+rtn")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_inputs_of_the_original_model_are_not_for_rotated_blocks(tmp_path, monkeypatch):
    """As for a model where only the trial finds that blocks cannot be run one after another."""
    model = sweep_configs.save("causal", "granite", tmp_path / "model")

    def found_by_the_trial(*_):
        raise NotOneAfterAnother("as a trial says")

    monkeypatch.setattr(run, "_entering_rows", found_by_the_trial)
    with pytest.raises(Unsupported, match=r"method rotate rewrites all blocks .* recorded in the original model"):
        qkit.quantize(model=model, out=tmp_path / "out", scheme="w8a16", method="rotate+gptq", samples=4, seqlen=32)


def test_the_memory_of_the_proof_is_forecast(tmp_path):
    model = sweep_configs.save("causal", "granite", tmp_path)
    memory = {
        m: prepare(Request(model=str(model), scheme="w8a16", method=m)).forecast.memory for m in ("rtn", "rotate")
    }
    block = sum(p.numel() for p in open_structure(str(model)).model.get_submodule("model.layers.0").parameters())
    assert memory["rotate"]["proof of the rotation"] >= 8 * block and "proof of the rotation" not in memory["rtn"]


def test_heads_that_are_repeated_in_another_order_are_no_source():
    """Heads of values in turns (0 1 0 1) and not one after another (0 0 1 1): a fold would scale the wrong rows."""
    pairs = torch.arange(8).view(2, 4)
    in_turns, in_order = pairs.repeat(2, 1).reshape(-1), pairs.repeat_interleave(2, 0).reshape(-1)
    assert Feed("v", in_order, 4).head_pattern(8) and not Feed("v", in_turns, 4).head_pattern(8)
    assert Feed("v", torch.arange(8)).head_pattern(8) and not Feed("v", torch.arange(8).flip(0)).head_pattern(8)


def test_which_norms_a_rotation_passes_through():
    rms, layer = RMSNorm(), nn.LayerNorm(8)
    assert commutes_with_rotations(rms) and not commutes_with_rotations(layer)
    assert norm_offset(rms) == norm_offset(layer) == 0.0
    assert not commutes_with_rotations(nn.LayerNorm(8, bias=False))
