"""Decoding with a static cache gives the tokens of transformers' generate."""

import pytest
import torch

import qkit
from qkit.errors import UsageError
from qkit.nn.sampling import by_sums
from qkit.runtime.generate import Decoder


@pytest.fixture(scope="module")
def model():
    return qkit.load("tiny-llama", dtype=torch.float32)


PROMPT = torch.tensor([[1, 5, 9, 200, 31, 7], [3, 3, 80, 41, 2, 11]])


def test_greedy_tokens(model):
    expected = model.generate(PROMPT, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    decoder = Decoder(model, 32)
    assert torch.equal(decoder.generate(PROMPT, 20), expected)
    assert torch.equal(decoder.generate(PROMPT, 20), expected)  # the cache starts anew
    assert torch.equal(decoder.generate(PROMPT[:1], 20), expected[:1])  # and with another batch


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (20, None), (50, 0.8)])
def test_sampled_tokens(model, top_k, top_p):
    torch.manual_seed(7)
    options = {"do_sample": True, "temperature": 0.7, "top_k": top_k or 0, "top_p": top_p or 1.0}
    expected = model.generate(PROMPT, max_new_tokens=20, eos_token_id=None, pad_token_id=0, **options)
    found = Decoder(model, 32).generate(PROMPT, 20, temperature=0.7, top_k=top_k, top_p=top_p, seed=7)
    assert torch.equal(found, expected)


def test_it_stops(model):
    whole = Decoder(model, 32).generate(PROMPT, 20)
    ends = {int(whole[0, 10]), int(whole[1, 8])}
    found = Decoder(model, 32).generate(PROMPT, 20, stop=ends)
    expected = model.generate(
        PROMPT, max_new_tokens=20, do_sample=False, eos_token_id=sorted(ends), pad_token_id=min(ends)
    )
    assert torch.equal(found, expected) and found.shape[1] < whole.shape[1]


def test_a_packed_model(model, tmp_path, run):
    out = tmp_path / "out"
    assert run("quantize", "--model", "tiny-llama", "--scheme", "w4a16", "--method", "rtn", "--out", str(out))[0] == 0
    packed = qkit.load(out, dtype=torch.float32)
    prompt = torch.arange(40, 60)[None]
    expected = packed.generate(prompt, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(Decoder(packed, 40).generate(prompt, 16), expected)


def test_too_many_tokens(model):
    with pytest.raises(UsageError, match="made for 10 in all"):
        Decoder(model, 10).generate(PROMPT, 5)


def test_drawing_by_sums():
    """The chances are kept, and what has none is never drawn, at neither end."""
    chances = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0]).expand(40_000, -1)
    drawn = by_sums(chances, torch.Generator().manual_seed(0))
    shares = drawn.bincount(minlength=6) / len(drawn)
    assert shares[[0, 2, 5]].sum() == 0
    torch.testing.assert_close(shares, chances[0], rtol=0, atol=4 * (0.25 / len(drawn)) ** 0.5)
    assert torch.equal(drawn, by_sums(chances, torch.Generator().manual_seed(0)))
    assert int(by_sums(torch.tensor([[0.0, 1e-30, 0.0]]), torch.Generator().manual_seed(0))) == 1
