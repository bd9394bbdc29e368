"""Scales of keys: the function stays, outliers of keys go; and weights and cache under one budget."""

import json
import shutil

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from qkit.families.materialize import load_block
from qkit.families.structure import ModelStructure
from qkit.files.checkpoint import Checkpoint
from qkit.kvcache.cache import make_cache
from qkit.kvcache.policy import CacheRequest, parse
from qkit.kvcache.scaling import exponents_of, key_maxima, search
from qkit.runtime.loading import load
from qkit.sensitivity.profile import Profile
from qkit.transforms.keys import scale_keys
from qkit.transforms.state import BlockState
from qkit.workflows.budget_bytes import running_bytes
from qkit.workflows.kv_cache import joint_choices
from qkit.workflows.quantize import Request, open_structure

FAMILIES = {"llama": {"attention_bias": True}, "qwen2": {}, "qwen3": {}, "mixtral": {}}


def scaled(model, structure: ModelStructure, exponents) -> None:
    """The fold, into a model that is loaded whole."""
    for block, e in zip(structure.blocks, exponents, strict=True):
        state = BlockState(structure=structure, block=block, module=load_block(structure, block, structure.dtype))
        scale_keys(state, e)
        model.get_submodule(block.path).load_state_dict(state.module.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_stays(tiny, family):
    """Exact in the checkpoint's own 16 bits, with grouped queries, biases and norms of heads."""
    path = tiny(family, **FAMILIES[family])
    structure = ModelStructure(Checkpoint.open(path))
    model, tokens = load(path, dtype=torch.float32), tiny_models.tokens()
    before = tiny_models.logits(model, tokens)
    heads, half = model.config.num_key_value_heads, 8
    chance = torch.Generator().manual_seed(3)
    each = torch.randint(-3, 4, (len(structure.blocks), 1 if family == "qwen3" else heads, half), generator=chance)
    scaled(model, structure, each.expand(-1, heads, -1).tolist())
    assert (tiny_models.logits(model, tokens) - before).abs().max() < 1e-5 * before.abs().max()
    if family != "qwen3":  # other exponents for the halves of a pair: the test would see it
        state = model.model.layers[0].self_attn.k_proj.weight.data
        state[0] *= 2
        assert (tiny_models.logits(model, tokens) - before).abs().max() > 1e-3


def test_outliers_of_keys_are_found_and_scaled_away(tiny):
    """Keys with channels 16 times as large as others, queries as much smaller: 2 bits are of no use until it is undone."""
    path = tiny("llama", num_key_value_heads=2)
    structure = ModelStructure(Checkpoint.open(path))
    model, tokens = load(path, dtype=torch.float32), tiny_models.tokens(4, 96)
    before = tiny_models.logits(model, tokens)
    hidden = torch.zeros(2, 2, 8, dtype=torch.int64)
    hidden[:, :, 2], hidden[0, 1, 5] = -4, -3
    scaled(model, structure, hidden.tolist())

    def error() -> float:
        with torch.inference_mode():
            cache = make_cache(model, parse("int4"))
            model(tokens[:, :95], past_key_values=cache)
            return tiny_models.relative(model(tokens[:, 95:], past_key_values=cache).logits, before[:, 95:])

    loud = error()
    attentions = [layer.self_attn for layer in model.model.layers]
    found = search(model, attentions, tokens, 4, 128)
    for layer in range(2):
        at = hidden[layer] == -4
        rest = found[layer][~at & (hidden[layer] == 0)].float().mean()
        assert (found[layer][at] - rest).min() >= 2  # most of the 4 octaves are found
    # Folded on top of what was hidden.
    scaled(model, structure, [(h + f).tolist() for h, f in zip(hidden, found, strict=True)])
    assert (tiny_models.logits(model, tokens) - before).abs().max() < 1e-5 * before.abs().max()
    assert error() < 0.7 * loud


def test_exponents_and_maxima(tiny):
    assert exponents_of(torch.tensor([[1.0, 4.0, 16.0, 64.0]]), 0.5).tolist() == [[-2, 0, 0, 2]]
    assert not exponents_of(torch.rand(2, 8), 0.0).any()
    model = load(tiny("llama"), dtype=torch.float32)
    rows = tiny_models.tokens(2, 16)
    apart, together = key_maxima(model, rows), key_maxima(model, rows, shared=True)
    assert apart[0].shape == (2, 8) and torch.equal(together[0], apart[0].amax(0).expand(2, 8))


def test_from_the_command_line(run, tiny, tmp_path, small):
    """Rounding to nearest goes along with rows that are scaled by powers of two: the packed files mean the same."""
    path = tmp_path / "loud"
    shutil.copytree(tiny("qwen2"), path)
    tensors = load_file(path / "model.safetensors")
    for name, by in (("k_proj", 16.0), ("q_proj", 1 / 16)):  # a pair of channels of every head
        for piece in ("weight", "bias"):
            t = tensors[f"model.layers.0.self_attn.{name}.{piece}"]
            t.view(-1, 16, *t.shape[1:])[:, [3, 11]] *= by
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    common = ("quantize", "--model", path, "--scheme", "w8a16", "--kv", "pm-kvq:2", "--max-length", 512, *small)
    assert run(*common, "--out", tmp_path / "plain")[0] == 0
    code, said, err = run(*common, "--kv-scale-keys", "--out", tmp_path / "scaled", "--json", tmp_path / "q.json")
    assert code == 0 and "scales of keys, octaves" in said, err
    exponents = json.loads((tmp_path / "scaled" / "qkit.json").read_text())["key_exponents"]
    assert any(e for layer in exponents for head in layer for e in head)
    plain, scaled_ = (load(tmp_path / n, dtype=torch.float32) for n in ("plain", "scaled"))
    tokens = tiny_models.tokens()
    before = tiny_models.logits(plain, tokens)
    assert (tiny_models.logits(scaled_, tokens) - before).abs().max() < 1e-5 * before.abs().max()
    biases = [m.model.layers[0].self_attn.k_proj.bias for m in (plain, scaled_)]
    assert torch.equal(biases[0] / torch.tensor(exponents[0]).repeat(1, 2).flatten().exp2(), biases[1])
    assert run("verify", tmp_path / "scaled")[0] == 0


@pytest.mark.parametrize(
    ("family", "changes", "kv", "words"),
    [
        ("llama", {}, "kivi2", "do not share a scale"),
        ("phi3", {}, "int4", "not declared as linears of their own"),
        ("opt", {}, "int4", "not declared as linears of their own"),
    ],
)
def test_what_cannot_be_scaled(run, tiny, tmp_path, family, changes, kv, words):
    common = ("quantize", "--model", tiny(family, **changes), "--scheme", "w8a16", "--kv", kv, "--kv-scale-keys")
    code, _, err = run(*common, "--out", tmp_path / "out")
    assert code in (2, 3) and words in err and not (tmp_path / "out").exists()


def test_weights_and_cache_share_a_memory(run, tiny, tmp_path, small, calib, quiet):
    """The plan of both is the cheapest of all within the bytes, and its bytes are what runs."""
    path, folder = tiny("llama"), tmp_path / "profile"
    code, _, err = run(
        "profile", "--model", path, "--out", folder, "--candidates", "int2,int4,int8", "--group-size", 32, "--rows", 2,
        "--measures", "kl", "--method", "rtn", *small,
    )  # fmt: skip
    assert code == 0, err
    made = Profile.load(folder)
    wanted = CacheRequest("pm-kvq:8-4-2", length=1024)
    cache = joint_choices(Request(model=str(path), calib=calib, samples=8, seqlen=32), wanted, quiet)
    tables = [np.array([(c.bytes, max(c.costs["kl"], 0.0)) for c in u.choices.values()]) for u in made.units] + [
        np.array([(c.uses["bytes"], c.cost) for c in u]) for u in cache.units
    ]
    sums = np.zeros((1, 2))  # of all plans: bytes, cost
    for t in tables:
        sums = (sums[:, None] + t).reshape(-1, 2)
    _, activations = running_bytes(open_structure(str(path)), 1024)
    beside = made.fixed_bytes + activations
    shares = set()
    for part in (0.1, 0.3, 0.6):
        memory = int(beside + sums[:, 0].min() + part * (sums[:, 0].max() - sums[:, 0].min()))
        code, said, err = run(
            "quantize", "--model", path, "--profile", folder, "--memory", f"{memory}B@1024", "--kv", "pm-kvq:8-4-2", "--method",
            "rtn", *small, "--json", tmp_path / "p.json", "--out", tmp_path / f"out{part}",
        )  # fmt: skip
        assert code == 0 and "KV cache: pm-kvq:8-4-2" in said, err
        data = json.loads((tmp_path / "p.json").read_text())
        weights, kv, finals = data["allocation"], data["kv"]["bytes"], data["kv"]["policy"]["finals"]
        assert weights["bytes"] + kv + beside <= memory and kv == sum(cache.sizes[w] for w in finals)
        cost = weights["cost"] + sum(
            c.cost for u, w in zip(cache.units, finals, strict=True) for c in u if c.name == str(w)
        )
        best = sums[sums[:, 0] <= memory - beside, 1].min()
        assert cost == pytest.approx(best, rel=1e-6)
        shares.add(kv)
    assert len(shares) > 1  # the cache gets more as there is more
    for options, words in (
        (("--memory", "1KB@1024", "--kv", "pm-kvq:2"), "--memory"),
        (("--memory", "9MB@1024", "--kv", "pm-kvq:2", "--kv-memory", "1MB"), "leave --kv-memory out"),
        (("--memory", "9MB@1024", "--kv", "pm-kvq:2", "--max-length", 99), "leave one of the two out"),
    ):
        code, _, err = run("plan", "--model", path, "--profile", folder, *options, "--method", "rtn", *small)
        assert code == (3 if words == "--memory" else 2) and words in err and len(err.strip().splitlines()) == 1
