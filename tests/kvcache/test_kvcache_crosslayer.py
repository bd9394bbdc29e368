"""Caches of differences between the inputs of layers: errors by depth, and what transformers asks of a cache whose layers
depend on those below."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from test_kvcache import small, tokens
from transformers import DynamicCache

from qkit.kvcache.cache import make_cache
from qkit.kvcache.crosslayer import cross_layers
from qkit.kvcache.policy import CachePolicy, parse
from qkit.kvcache.shape import CacheShape
from qkit.kvcache.store import quantize
from qkit.kvcache.xquant import InputSource, sources

CL2 = replace(parse("xquant-cl2"), group=8, window=16)


def walk(layers: int, count: int, width: int = 64) -> list[torch.Tensor]:
    """Inputs of layers, each a step away from those of the layer below."""
    g = torch.Generator().manual_seed(0)
    found = [torch.randn(2, count, width, generator=g)]
    for _ in range(layers - 1):
        found.append(found[-1] + 0.15 * torch.randn(2, count, width, generator=g))
    return found


def pasts(cache, n: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of the past that each layer gives to new tokens; the cache stays as it is."""
    x = torch.zeros(cache.layers[0].batch_size, n, 64)
    return [layer.exchange(x) for layer in deepcopy(cache).layers]


def filled(kind: str, batch: int = 3, length: int = 60):
    """A cache of five layers after a prompt and a few steps, with its model and the tokens."""
    model, ids = small(kind, 5), tokens(batch, length)
    cache = make_cache(model, CL2)
    with torch.inference_mode():
        for part in (ids[:, :30], ids[:, 30:51], *ids[:, 51:].split(1, dim=1)):
            model(part, past_key_values=cache)
    assert cache.widths == [4, 4, 4, 2, 2] and cache.layers[0].body[0].tokens == 48
    return model, cache


@pytest.mark.parametrize(
    ("name", "expected"),
    [("xquant-cl2", (4, 4, 4, 2, 2)), ("xquant-cl3", (4, 4, 4, 3, 3)), ("xquant-cl8", (8,) * 5), ("xquant2", (2,) * 5)],
)
def test_the_first_three_layers_have_four_bits_at_least(name, expected):
    assert parse(name).widths_of(5) == expected


@pytest.mark.parametrize("kind", ("heads", "qwen2"))
def test_errors_do_not_grow_with_depth(kind):
    """Where differences are taken to what the layers below give back; where they are taken to what went in, errors add up.
    Of grouped queries (qwen2) what counts is in the space that the layer's keys and values depend on, another half of all
    for every layer here."""
    inputs = walk(17, 40)
    made = sources(small(kind, 17), 16, shared=True)
    assert (made[0].latent is None) == (kind == "heads")
    layers = cross_layers(replace(CL2, window=0), made)[:16]  # the last one hands nothing on
    closed, opened, total = [], [], torch.zeros(())
    for i, (layer, x) in enumerate(zip(layers, inputs, strict=False)):
        source = layer.source
        layer.exchange(x)
        below = inputs[i - 1] if i else torch.zeros_like(x)
        total = total + quantize((x - below)[:, None], layer.width, 8).dequantize(torch.float32)[:, 0]
        wanted = torch.cat(source.kept(x), dim=3)
        closed.append(float((torch.cat(source.kept(layer.below.inputs), dim=3) - wanted).norm() / wanted.norm()))
        opened.append(float((total - x).norm() / x.norm()))
    assert max(closed[3:]) < 1.05 * closed[3] < 0.1
    assert opened[-1] > 2 * opened[3] and opened[-1] > 2 * closed[-1]
    direct = quantize(x[:, None], 2, 8).dequantize(torch.float32)[:, 0]
    assert float((direct - x).norm() / x.norm()) > 3 * closed[-1]


def test_the_shared_basis_is_of_keys_and_values():
    """Nothing of them is lost in it, and no channel of it matters much more than another, as those of U do."""
    attention = small("qwen2").model.layers[0].self_attn
    attention.k_proj.weight.data *= torch.logspace(0, -2, 16)[:, None]
    weight = torch.cat([attention.k_proj.weight, attention.v_proj.weight]).detach().T
    basis = torch.cat([u for u, _ in InputSource.of(small("qwen2"), attention, 16, shared=True).latent], dim=1)
    torch.testing.assert_close(basis @ (basis.T @ weight), weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(basis.T @ basis, torch.eye(32), rtol=1e-4, atol=1e-5)
    turned, singular = (basis.T @ weight).norm(dim=1), torch.linalg.svdvals(weight)
    assert turned.max() < 4 * turned.min() and singular.max() > 50 * singular.min()


def test_what_is_kept_does_not_depend_on_the_steps():
    """Fed whole or in pieces: the same codes, once tokens are in the body; newest tokens are there whole."""
    inputs = walk(5, 90)
    source = sources(small("heads"), 16, shared=True)[0]
    found = []
    for pieces in ([90], [40, 1, 1, 7, 1, 16, 24], [1] * 90):
        layers = cross_layers(CL2, [source] * 5)
        for part in zip(*(x.split(pieces, dim=1) for x in inputs), strict=True):
            for layer, x in zip(layers, part, strict=True):
                layer.exchange(x)
        assert [layer.get_seq_length() for layer in layers] == [90] * 5
        assert torch.equal(source.inputs(tuple(s.data for s in layers[4].recent)), inputs[4][:, 80:])
        found.append([s.codes() for layer in layers for s in layer.body])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("kind", ("llama", "qwen2", "heads"))
def test_sequences_are_cut_chosen_and_copied(kind):
    """What is left of the past is what it was, in every layer."""
    _, cache = filled(kind)
    before = pasts(cache)
    for left in (60, 55, 48, 37, 32, 5):
        cut = deepcopy(cache)
        cut.crop(left - 60)
        assert cut.get_seq_length() == left
        for a, b in zip(pasts(cut), before, strict=True):
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(x, y[:, :, :left])
    for change, rows in (
        (lambda c: c.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        chosen = deepcopy(cache)
        change(chosen)
        for a, b in zip(pasts(chosen), before, strict=True):
            assert a[0].shape[0] == len(rows)
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(x, y[rows])
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == 0 and cache.widths == [4, 4, 4, 2, 2]


@torch.inference_mode()
def test_a_prompt_is_used_again():
    """Continuations of a copied prompt are those of the prompt computed anew, and of a cache that was used and reset."""
    model, ids = small("qwen2", 5), tokens(1, 40)
    prompt = make_cache(model, CL2)
    model(ids, past_key_values=prompt)
    used = make_cache(model, CL2)
    model(tokens(2, 33), past_key_values=used)
    for seed in (1, 2):
        more = tokens(1, 30, seed)
        used.reset()
        model(ids, past_key_values=used)
        found = [model(more, past_key_values=c).logits for c in (deepcopy(prompt), used)]
        torch.testing.assert_close(*found)
    assert prompt.get_seq_length() == 40


@pytest.mark.parametrize("kind", ("llama", "qwen2", "opt"))
def test_sixteen_bits_give_the_beams_of_a_plain_cache(kind):
    model, ids, mask = small(kind, 4), tokens(2, 24), torch.ones(2, 24, dtype=torch.int64)
    mask[1, :9] = 0
    options = {"num_beams": 3, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    caches = DynamicCache(), make_cache(model, CachePolicy(kind="xquant-cl", widths=(16,), group=8, window=16))
    beams = [model.generate(ids, attention_mask=mask, past_key_values=c, **options) for c in caches]
    assert torch.equal(*beams) and caches[1].layers[0].body[0].tokens == 32


@pytest.mark.parametrize("kind", ("llama", "qwen2", "heads"))
def test_bytes_are_those_of_all_tensors(kind):
    """Between steps nothing is held but what is counted, and what is said beforehand is the most."""
    model, cache = filled(kind, batch=1)
    held = [t for layer in cache.layers for pair in layer.segments for s in pair for t in s.tensors]
    assert cache.nbytes == sum(t.numel() * t.element_size() for t in held)
    assert all(layer.below.inputs is None for layer in cache.layers)
    heads = CacheShape.of(model)
    most = sum(heads.bytes_at(CL2, w, 64) for w in CL2.widths_of(heads.layers))
    with torch.inference_mode():
        model(tokens(1, 3), past_key_values=cache)
    full = cache.nbytes - 5 * 15 * 2 * cache.layers[0].recent[0].data.shape[3] * 2  # float32 here: twice 16 bits
    assert cache.get_seq_length() == 63 and full == most
