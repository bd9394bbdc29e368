"""What vLLM's caches hold of keys and values."""

import json
import os
import subprocess

import pytest
import torch

from qkit.kvcache.engine_caches import ENGINE_CACHES, held_layers, refusal
from qkit.kvcache.engine_caches import _held as hold  # what one layer's cache holds

X = torch.randn(1, 2, 64, 32, generator=torch.Generator().manual_seed(0)) * 2
ONE = (1.0, 1.0)
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def grid(dtype: torch.dtype) -> torch.Tensor:
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return numbers[numbers.isfinite()].unique()


def nearest(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return values[(x[..., None] - values).abs().argmin(-1)]


def test_fp8_takes_the_scale_of_the_side_and_of_the_head():
    scales = (torch.tensor([0.01, 0.04]).view(2, 1, 1), 0.5)
    for head, scale in enumerate((0.01, 0.04)):
        found = hold("fp8", scales, X, 0)[0, head]
        torch.testing.assert_close(
            found, nearest((X[0, head] / scale).clamp(-448, 448), grid(torch.float8_e4m3fn)) * scale
        )
    torch.testing.assert_close(hold("fp8", scales, X, 1), nearest(X / 0.5, grid(torch.float8_e4m3fn)) * 0.5)


def test_e5m2_has_no_scale():
    assert torch.equal(hold("fp8_e5m2", ONE, X, 0), nearest(X, grid(torch.float8_e5m2)))
    assert float(hold("fp8_e5m2", ONE, torch.full((1, 1, 1, 16), 1e6), 0)[0, 0, 0, 0]) == 57344


@pytest.mark.parametrize(("name", "largest"), [("int8_per_token_head", 127.0), ("fp8_per_token_head", 448.0)])
def test_a_scale_for_each_token_of_each_head(name, largest):
    found = hold(name, ONE, X, 0)
    scale = X.abs().amax(-1, keepdim=True) / largest
    values = torch.arange(-127.0, 128.0) if "int8" in name else grid(torch.float8_e4m3fn)
    torch.testing.assert_close(found, nearest(X / scale, values) * scale, rtol=1e-4, atol=1e-5)
    changed = X.clone()
    changed[0, 1, 3] *= 100  # another token of another head
    assert torch.equal(hold(name, ONE, changed, 0)[0, 0], found[0, 0])
    assert not bool(hold(name, ONE, torch.zeros(1, 1, 2, 16), 0).any())


@pytest.mark.parametrize("channels", (32, 96))
def test_int4_is_rounded_behind_signs_and_a_hadamard_transform(channels):
    x = torch.randn(1, 2, 16, channels, generator=torch.Generator().manual_seed(1))
    x[..., 3] = 40.0  # an outlier that would leave 16 steps without a transform nothing else
    found = hold("int4_per_token_head", ONE, x, 0)
    span = x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)
    direct = (x / (span / 15)).round() * (span / 15)
    assert float((found - x).square().mean()) < 0.5 * float((direct - x).square().mean())
    block = channels & -channels
    # A transform does not change the size of an error: half a step in each transformed channel at the most.
    norms = x.unflatten(-1, (-1, block)).square().sum((-1, -2)).sqrt()
    assert bool(((found - x).square().sum(-1).sqrt() <= norms * 2 / 15 * 0.5 * block**0.5).all())
    assert float((found - x).abs().max()) > 0


def test_nvfp4_is_the_nearest_under_the_scale_of_the_file():
    scale = float(X.abs().max()) / 448  # the scale of an FP8 cache, which is what vLLM gives its NVFP4 cache
    found = hold("nvfp4", (scale, 1.0), X, 0)
    groups = X.unflatten(-1, (-1, 16))
    steps = (groups.abs().amax(-1, keepdim=True) / 6 / scale).to(torch.float8_e4m3fn).float() * scale
    wanted = (nearest((groups / steps).abs(), E2M1) * steps * groups.sign()).flatten(-2)
    # Halfway numbers aside, of which the argmin takes the lower.
    assert float((found - wanted).abs().gt(1e-4).float().mean()) < 0.01
    own = float((found - X).square().mean())
    finer = float((hold("nvfp4", (scale / 6, 1.0), X, 0) - X).square().mean())
    assert own < 1.02 * finer  # amax / 448 serves NVFP4 as well as amax / 2688


def test_layers_that_stay_in_16_bits():
    held = held_layers(None, "fp8", None, 4, frozenset({1, 3}))
    assert [h is None for h in held] == [False, True, False, True]
    assert held_layers(None, "auto", None, 2) == [None, None]


def test_what_vllm_refuses():
    assert refusal("fp8_e5m2", "fp", 64) and not refusal("fp8_e5m2", None, 64)
    assert refusal("int8_per_token_head", "fp-head", 64) and not refusal("int8_per_token_head", "fp", 64)
    assert not refusal("fp8", "fp-head", 64)
    assert "multiple of 16" in refusal("nvfp4", None, 40)
    assert [ENGINE_CACHES[n].bytes_of(64) for n in ("auto", "fp8", "int8_per_token_head", "nvfp4")] == [128, 64, 68, 36]


SCRIPT = """
import json, sys, torch
from typing import get_args
from vllm.config.cache import CacheDType
from vllm.v1.attention.ops.int4_per_token_head import single_rht
x = torch.tensor(json.load(sys.stdin))
print(json.dumps({"names": get_args(CacheDType), "turned": single_rht(x).tolist()}))
"""


@pytest.mark.skipif("QKIT_VLLM_PYTHON" not in os.environ, reason="QKIT_VLLM_PYTHON names no interpreter with vLLM")
def test_names_and_signs_are_those_of_vllm(monkeypatch):
    from qkit.kvcache import engine_caches

    run = subprocess.run(
        [os.environ["QKIT_VLLM_PYTHON"], "-c", SCRIPT], input=json.dumps(X.tolist()), capture_output=True, text=True,
        check=True, env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
    )  # fmt: skip
    said = json.loads(run.stdout.splitlines()[-1])
    assert set(ENGINE_CACHES) <= set(said["names"])
    seen = []
    plain = engine_caches.hadamard
    monkeypatch.setattr(engine_caches, "hadamard", lambda x, block: seen.append(plain(x, block)) or seen[-1])
    hold("int4_per_token_head", ONE, X, 0)
    torch.testing.assert_close(seen[0] * 32**0.5, torch.tensor(said["turned"]), rtol=1e-4, atol=1e-4)
