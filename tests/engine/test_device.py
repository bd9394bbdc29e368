"""A run on another device gives the bytes of a run on the CPU: nothing that it makes is on the wrong device.

The device computes on the CPU (``second_device``). An operation between tensors of two devices fails there, as on a GPU.
"""

import hashlib
import json

import pytest
import second_device
import torch

import qkit
from qkit.errors import UsageError
from qkit.system.devices import find_device

GROUPED = ("w3a16", "w4a16", "w4a16_asym")
LEARNED = {"steps": 3, "loss_weighted": True, "guided": True, "e2e_steps": 2}
SWEPT = {"signed": True, "sweeps": 2, "compensate": 0.5}
CASES = {
    "gptq": ("llama", {"scheme": "w3a16", "method": "gptq", "options": SWEPT}),
    "order": ("llama", {"scheme": "w4a16_asym", "method": "gptq", "options": {"order": "activation"}}),
    "awq": ("opt", {"scheme": "w4a16", "method": "awq"}),
    "smoothquant": ("gemma3", {"scheme": "w8a8", "method": "smoothquant+gptq"}),
    "rotate": ("qwen3", {"scheme": "w4a16", "method": "rotate+gptq", "outliers": 0.5, "rank": 4}),
    "nvfp4": ("qwen3_moe", {"scheme": "nvfp4", "method": "residual+gptq"}),
    "fp8": ("phi3", {"scheme": "fp8", "method": "gptq", "head": "int8"}),
    "experts": ("mixtral", {"scheme": "w4a16", "method": "awq+gptq", "prune_experts": 0.25}),
    "learned": ("llama", {"scheme": "w4a16", "method": "gptq+signround", "options": LEARNED, "synthetic_samples": 4}),
    "gguf": ("llama", {"scheme": "q3_k", "method": "signround", "options": {"steps": 2}}),
    "cache": ("llama", {"scheme": "w4a8", "method": "gptq", "kv": "fp8"}),
}


def digests(out):
    files = sorted((*out.glob("*.safetensors"), *out.glob("*.gguf")))
    return [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_of_the_cpu(name, tiny, calib, tmp_path):
    family, options = CASES[name]
    group = {"group_size": 32} if options["scheme"] in GROUPED else {}
    rows = {"calib": calib, "samples": 8, "seqlen": 32, "threads": 1}
    on_cpu, on_second = tmp_path / "cpu", tmp_path / "second"
    for out, device in ((on_cpu, "cpu"), (on_second, second_device.NAME)):
        assert qkit.quantize(tiny(family), out=out, device=device, **rows, **group, **options).ok
    assert digests(on_cpu) == digests(on_second)
    if (on_second / "recipe.yaml").exists():
        assert "device: second" in (on_second / "recipe.yaml").read_text()
        assert "device" not in (on_cpu / "recipe.yaml").read_text()


def test_the_device_refuses_tensors_of_two_devices():
    x = torch.ones(3, device=second_device.DEVICE)
    assert torch.equal((x * 2).cpu(), torch.full((3,), 2.0))
    with pytest.raises(RuntimeError, match="two devices"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError):
        x.numpy()


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "mps"])
def test_devices_that_are_refused(name):
    with pytest.raises(UsageError, match="use auto, cpu, cuda"):
        find_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(run, tiny, calib, tmp_path):
    assert find_device("auto") == "cpu"
    code, _, said = run(
        "quantize", "--model", tiny("llama"), "--scheme", "w8a16", "--method", "gptq", "--calib", calib,
        "--device", "cuda", "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 2 and "--device cuda: PyTorch" in said and "sees no GPU" in said
    assert not (tmp_path / "out").exists()


def test_plan_says_the_device(run, tiny, calib, tmp_path):
    file = tmp_path / "plan.json"
    code, said, _ = run(
        "plan", "--model", tiny("llama"), "--scheme", "w8a16", "--method", "gptq", "--calib", calib, "--seqlen", 32,
        "--samples", 8, "--device", second_device.NAME, "--json", file,
    )  # fmt: skip
    assert code == 0 and "on second:0" in " ".join(said.split())
    plan = json.loads(file.read_text())
    assert plan["device"] == second_device.NAME and "seconds" not in plan["forecast"]
