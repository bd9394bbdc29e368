"""Layers that quantize their inputs are solved on quantized inputs: these are what their weights are multiplied with."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import Quiet

from qkit.calibration.statistics import Stats
from qkit.runtime.loading import load, load_tokenizer
from qkit.solvers import gptq
from qkit.solvers.task import Task
from qkit.tensor.activations import quantize_activations, static_scale
from qkit.tensor.formats import SCHEMES
from qkit.tensor.qtensor import dequantize
from qkit.workflows.quantize import Request, quantize

SCHEME = SCHEMES["NVFP4"]
SAMPLES, LENGTH = 32, 64


def solution(weights: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What GPTQ gives for the first of some weights with inputs x [tokens, in], float32 [out, in]."""
    hessian = x.T @ x / len(x)
    stats = Stats(tokens=len(x), mean_square=hessian.diagonal(), sample=x, hessian=hessian)
    amax = torch.stack([w.abs().max() for w in weights]).max().reshape(1)
    task = Task(weights=weights, fmt=SCHEME.weights, dtype=torch.bfloat16, stats=stats, amax=amax)
    return dequantize(gptq.solve(task).qtensors[0])


def test_a_layer_is_solved_on_the_inputs_it_multiplies(tiny, tmp_path: Path) -> None:
    model = str(tiny("llama", num_hidden_layers=1))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{i * i % 97} and" for i in range(4000)))
    asked = Request(
        model=model,
        scheme="nvfp4",
        method="gptq",
        calib=text,
        samples=SAMPLES,
        seqlen=LENGTH,
        options={"sweeps": 0, "compensate": 0.0},
        threads=1,
    )
    assert quantize(asked, tmp_path / "out", Quiet()).ok
    original = load(model)
    ids = load_tokenizer(model)(text.read_text(), return_tensors="pt")["input_ids"][0, : SAMPLES * LENGTH]
    attention = original.model.layers[0].self_attn
    inputs: list[torch.Tensor] = []
    attention.q_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    with torch.inference_mode():
        original(ids.view(SAMPLES, LENGTH))
    (x,) = inputs
    static = torch.tensor([static_scale(float(x.abs().max()), SCHEME.activations)])
    weights = [attention.get_submodule(f"{n}_proj").weight.detach().float() for n in "qkv"]
    of_file = load(str(tmp_path / "out"), dtype=torch.float32).model.layers[0].self_attn.q_proj.weight
    of_quantized = solution(weights, quantize_activations(x, SCHEME.activations, static).float())
    same, plain_same = (float((of_file == s).float().mean()) for s in (of_quantized, solution(weights, x.float())))
    assert same > 0.98 > plain_same
