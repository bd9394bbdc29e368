"""Modality-balanced scales: the objective on the grid, the ratios against autograd, the command line."""

from dataclasses import replace
from itertools import pairwise

import pytest
import qkit_data
import tiny_vlms
import torch
from safetensors.torch import load_file
from torch.nn import functional

from qkit.calibration.dataset import ANSWER, KINDS, VISION
from qkit.calibration.image_text import rows_of
from qkit.calibration.statistics import Stats
from qkit.errors import BadCalibration
from qkit.families.blocks import Group
from qkit.families.structure import ModelStructure
from qkit.files.checkpoint import Checkpoint
from qkit.runtime.loading import load
from qkit.tensor.formats import scheme
from qkit.tensor.qtensor import dequantize, find_params, quantize
from qkit.transforms.balance import MODALITY_WEIGHTS, balanced_error, gradients, ratios
from qkit.transforms.scales import awq_candidates, search
from qkit.transforms.state import BlockState
from qkit.transforms.table import RATIOS, TRANSFORMS
from qkit.workflows.quantize import Request, prepare

W3 = scheme("w3a16")


@pytest.fixture(scope="module")
def toy():
    """Inputs of which pictures and answers use different channels, and weights that read both."""
    chance = torch.Generator().manual_seed(0)
    loud = torch.ones(2, 128)
    loud[0, :20], loud[1, 20:40] = 12.0, 12.0
    kinds = torch.tensor([VISION] * 300 + [ANSWER] * 60 + [KINDS.index("text")] * 40, dtype=torch.uint8)
    x = torch.randn(400, 128, generator=chance) * loud[(kinds == ANSWER).long()]
    weights = [torch.randn(n, 128, generator=chance) for n in (96, 64)]
    ones = torch.ones(400)
    stats = Stats(
        tokens=400,
        mean_square=x.square().mean(0),
        sample=x,
        hessian=None,
        absmax=x.abs().amax(0),
        mean_abs=x.abs().mean(0),
        kinds=kinds,
        sample_weight=ones,
    )
    return weights, stats


def chosen(weights, stats, r: float, power: int = 1):
    state = BlockState(
        structure=None,
        block=None,
        module=None,
        stats={"k": stats},
        original_values={MODALITY_WEIGHTS: {"attention": r}},
    )
    declared = Group(("self_attn.q_proj", "self_attn.k_proj"))
    group = type("Group", (), {"key": "k", "hook": "self_attn.q_proj", "declared": declared})
    loss = balanced_error(state, group, power)
    return search(weights, stats, W3, awq_candidates(weights, stats), torch.float32, loss), loss


def errors(weights, stats, s) -> dict[int, float]:
    """By kind, the sum of absolute errors of the outputs with that scale."""
    found = torch.zeros(len(stats.sample))
    for w in weights:
        scaled = w * s
        p = find_params(scaled, W3.weights, torch.float32, importance=stats.mean_square / s.square())
        back = dequantize(quantize(scaled, p, W3.weights)) / s
        found += ((back - w) @ stats.sample.T).abs().sum(0)
    return {k: float(found[stats.kinds == k].sum()) for k in (VISION, ANSWER)}


def test_answers_gain_what_pictures_lose(toy):
    """As r falls, the error of answers does not rise and that of pictures does not fall: exact on a finite grid."""
    found = [errors(*toy, chosen(*toy, r)[0]) for r in (1.0, 0.3, 0.1, 0.03, 0.0)]
    for a, b in pairwise(found):
        assert b[ANSWER] <= a[ANSWER] * (1 + 1e-5) and b[VISION] >= a[VISION] * (1 - 1e-5)
    assert found[-1][ANSWER] < found[0][ANSWER]


def test_without_balance_it_is_awq_with_absolute_errors(toy):
    weights, stats = toy
    stats = replace(stats, kinds=torch.where(stats.kinds == VISION, VISION, ANSWER).to(torch.uint8))

    def absolute(outputs, references):
        return float(sum((o - x).abs().sum().double() for o, x in zip(outputs, references, strict=True)))

    plain = search(weights, stats, W3, awq_candidates(weights, stats), torch.float32, absolute)
    assert torch.equal(chosen(weights, stats, 1.0)[0], plain)
    for r in (0.3, 0.05):  # and its own objective is never worse than at AWQ's choice
        s, _ = chosen(weights, stats, r)
        own, other = (errors(weights, stats, x) for x in (s, plain))
        assert r * own[VISION] + own[ANSWER] <= r * other[VISION] + other[ANSWER] + 1e-3


def test_tokens_weigh_what_they_stand_for(toy):
    """A sample of every third piece of a picture, counted three times, has the objective of all of them, nearly."""
    weights, stats = toy
    keep = torch.tensor([k != VISION or i % 3 == 0 for i, k in enumerate(stats.kinds.tolist())])
    fewer = replace(
        stats, sample=stats.sample[keep], kinds=stats.kinds[keep],
        sample_weight=torch.where(stats.kinds == VISION, 3.0, 1.0)[keep],
    )  # fmt: skip
    noise = [0.1 * torch.randn(w.shape, generator=torch.Generator().manual_seed(1)) for w in weights]

    def value(stats) -> float:
        outputs = [stats.sample @ (w + n).T for w, n in zip(weights, noise, strict=True)]
        return chosen(weights, stats, 0.5)[1](outputs, [stats.sample @ w.T for w in weights])

    assert value(fewer) == pytest.approx(value(stats), rel=0.05)


def test_gradients_are_autograds(vlm):
    """Against the same loss with the outputs of two modules as leaves."""
    path = vlm("llava")
    model, structure = load(path, dtype=torch.float32), ModelStructure(Checkpoint.open(path))
    each = [tiny_vlms.inputs("llava", model, seed) for seed in range(2)]
    for x in each:
        del x["attention_mask"]
    rows = rows_of(each, [len(x["input_ids"][0]) - 4 for x in each], {tiny_vlms.IMAGE}, "two")
    found = gradients(model, structure, rows)
    for block, part, name in ((0, "attention", "self_attn.o_proj"), (1, "mlp", "mlp.down_proj")):
        module = model.get_submodule(f"{structure.blocks[block].path}.{name}")
        wanted = {VISION: 0.0, ANSWER: 0.0}
        for x, kinds in zip(each, rows.kinds, strict=True):
            leaves = []

            def cut(module, args, output, leaves=leaves):
                leaves.append(output.detach().requires_grad_())
                return leaves[0]

            handle = module.register_forward_hook(cut)
            logits = model(**x).logits[0]
            handle.remove()
            loss = functional.cross_entropy(logits[-5:-1], x["input_ids"][0, -4:])
            (grad,) = torch.autograd.grad(loss, leaves)
            for k in wanted:
                wanted[k] += float(grad[0, kinds == k].abs().mean()) / 2
        assert found[block][part] == pytest.approx((wanted[VISION], wanted[ANSWER]), rel=1e-4)
    assert all(v > 0 and a > 0 for block in found[:-1] for v, a in block.values())
    # The last block's outputs at pictures reach no answer.
    assert found[-1]["mlp"][0] == 0 and ratios(found)[-1]["mlp"] > 0


def test_ratios_of_every_linear(run, vlm, tmp_path):
    """Those at the output projections are the parts'; a group's linears weigh pictures each in its own way."""
    path = vlm("llava", processor=True)
    found = prepare(Request(model=str(path), scheme="w3a16", method="mbq", samples=4))
    model = load(path, dtype=torch.float32)
    parts, each = (ratios(gradients(model, found.structure, found.plan.calibration, ratios_by=e)) for e in RATIOS)
    for a, b in zip(parts, each, strict=True):
        assert len(b) == 7 and b["self_attn.o_proj"] == a["attention"] and b["mlp.down_proj"] == a["mlp"]
        assert len(set(b.values())) == 7
    command = ("quantize", "--model", path, "--scheme", "w3a16", "--method", "mbq", "--samples", 4)
    for option, name in ((), "a"), (("--option", "ratios=linear"), "b"):
        assert run(*command, *option, "--out", tmp_path / name)[0] == 0
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in "ab")
    assert first != second
    tensors = {"quantized": load_file(tmp_path / "a" / "model.safetensors")}
    for inputs in ("original", "distort"):
        assert run(*command, "--option", f"inputs={inputs}", "--out", tmp_path / inputs)[0] == 0
        tensors[inputs] = load_file(tmp_path / inputs / "model.safetensors")
    for a, b in (("quantized", "original"), ("quantized", "distort"), ("original", "distort")):
        differ = {n for n, t in tensors[a].items() if not torch.equal(t, tensors[b][n])}
        # Nothing is quantized before the first block.
        assert any(".layers.1." in n for n in differ) and not any(".layers.0." in n for n in differ), (a, b)
    code, _, err = run(*command, "--option", "ratios=block", "--out", tmp_path / "c")
    assert code == 2 and "expected one of part, linear" in err


def test_scales_leave_the_function_as_it_is(vlm, tmp_path):
    """Logits of a float32 model whose scales are folded and whose weights are not rounded: core of every scale search."""
    path = tiny_vlms.make("llava", tmp_path / "exact", dtype=torch.float32)
    tiny_vlms.add_processor(path)
    found = prepare(Request(model=str(path), scheme="w3a16", method="mbq", samples=4))
    structure, rows = found.structure, found.plan.calibration
    model = load(path, dtype=torch.float32)
    before = tiny_vlms.logits("llava", model)
    balance = ratios(gradients(model, structure, rows))
    taken: dict[str, list[torch.Tensor]] = {}

    def keep(name):
        return lambda module, args: taken.setdefault(name, []).append(args[0][0])

    hooks = {f"{b.path}.{g.hook}": g.key for b in structure.blocks for g in b.groups}
    handles = [model.get_submodule(n).register_forward_pre_hook(keep(key)) for n, key in hooks.items()]
    with torch.inference_mode():
        for row in rows.inputs:
            model(**row)
    for handle in handles:
        handle.remove()
    kinds = torch.cat([k[: r["input_ids"].shape[1]] for k, r in zip(rows.kinds, rows.inputs, strict=True)])
    changed = 0
    for i, block in enumerate(structure.blocks):
        state = BlockState(
            structure=structure,
            block=block,
            module=model.get_submodule(block.path),
            original_values={MODALITY_WEIGHTS: balance[i]},
        )
        for g in block.groups:
            x = torch.cat(taken[g.key])
            state.stats[g.key] = Stats(
                tokens=len(x),
                mean_square=x.square().mean(0),
                sample=x,
                hessian=None,
                absmax=x.abs().amax(0),
                mean_abs=x.abs().mean(0),
                kinds=kinds,
                sample_weight=torch.ones(len(x)),
            )
        TRANSFORMS["mbq"].apply(state, found.plan.schemes, 0)
        state.write_back()
        changed += len(state.changed)
    after = tiny_vlms.logits("llava", model)
    assert changed >= 8 and (after - before).norm() < 1e-5 * before.norm()


def test_ratios_have_a_floor():
    found = [{"attention": (1.0, 10.0), "mlp": (v, 4.0)} for v in (1.0, 2.0, 8.0)]
    assert ratios(found) == [{"attention": 0.1, "mlp": x} for x in (0.5, 0.5, 2.0)]


def test_text_alone_is_refused(run, tiny, vlm, tmp_path):
    common = ("quantize", "--scheme", "w3a16", "--method", "mbq", "--out", tmp_path / "out")
    code, _, err = run(*common, "--model", tiny("llama"), "--seqlen", 32)
    assert code in (2, 3) and "this is no vision-language model (llama): use awq" in err
    text = qkit_data.text_path("calibration")
    code, _, err = run(*common, "--model", vlm("llava"), "--calib", text, "--samples", 4, "--seqlen", 32)
    assert code == 2 and "needs image-text data" in err


def test_answers_without_a_gradient(vlm):
    """Of one token, which nothing comes after; rows without a picture add nothing at pictures."""
    path = vlm("llava")
    model, structure = load(path, dtype=torch.float32), ModelStructure(Checkpoint.open(path))
    seen = tiny_vlms.inputs("llava", model)
    ids = seen["input_ids"]
    with pytest.raises(BadCalibration, match="short ones: answers of one token"):
        gradients(model, structure, rows_of([seen], [ids.shape[1] - 1], {tiny_vlms.IMAGE}, "short ones"))
    text = {"input_ids": ids[ids != tiny_vlms.IMAGE][None]}
    alone, both = (
        gradients(model, structure, rows_of(x, [len(r["input_ids"][0]) - 4 for r in x], {tiny_vlms.IMAGE}, "rows"))
        for x in ([seen], [seen, text])
    )
    for a, b in zip(alone, both, strict=True):
        for part, (vision, _) in a.items():
            assert b[part][0] == pytest.approx(vision / 2) and b[part][1] > 0
