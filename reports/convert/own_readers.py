"""The plain weights of quantized folders, as the reader of the tool that owns their layout decodes them.

Runs in the environment of that tool, without qkit:
    PYTHON own_readers.py KIND OUT.safetensors FOLDER
KIND: gptqmodel, awq (GPTQModel's function), autoround, compressed-tensors (through transformers), modelopt. Weights are written in the dtype in which
that reader computes them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def gptqmodel(folder: str) -> dict[str, torch.Tensor]:
    """GPTQModel's own loader on a CPU, and what its torch kernel multiplies with."""
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(folder, backend=BACKEND.TORCH, device="cpu")
    linears = [(n, m.eval()) for n, m in model.model.named_modules() if hasattr(m, "qweight")]
    return {f"{n}.weight": m.dequantize_weight().T.contiguous().clone() for n, m in linears}


def awq(folder: str) -> dict[str, torch.Tensor]:
    """GPTQModel's function for AWQ's layout (its CPU kernel is compiled for minutes first)."""
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    tensors, found = load_file(Path(folder) / "model.safetensors"), {}
    for name in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
        q, z, s = (tensors[f"{name}.{leaf}"] for leaf in ("qweight", "qzeros", "scales"))
        found[f"{name}.weight"] = dequantize_gemm(q, z, s, 4, q.shape[0] // s.shape[0]).T.contiguous()
    return found


def autoround(folder: str) -> dict[str, torch.Tensor]:
    """AutoRound's own layers in transformers: what they make of a unit matrix is their weight, transposed."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype="auto").eval()
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            columns = module.in_features if hasattr(module, "in_features") else module.infeatures
            with torch.no_grad():
                unit = torch.eye(columns, dtype=module.scales.dtype)
                found[f"{name}.weight"] = module(unit).T.contiguous().clone()
    return found


def compressed_tensors(folder: str) -> dict[str, torch.Tensor]:
    """Stock transformers with compressed-tensors, after the forward pass that decompresses."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        model(torch.arange(1, 17)[None])
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n]
    return {f"{n}.weight": m.weight.detach().clone() for n, m in linears}


def modelopt(folder: str) -> dict[str, torch.Tensor]:
    """ModelOpt's own tensor classes, in float32."""
    from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP4QTensor, MXFP8QTensor, NVFP4QTensor

    tensors = load_file(Path(folder) / "model.safetensors")
    found = {}
    for name in [n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale")]:
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        shape = torch.Size((weight.shape[0], weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)))
        if weight.dtype == torch.uint8 and scale.dtype == torch.uint8:
            made = MXFP4QTensor(shape, torch.float32, weight)
            plain = made.dequantize(scale=scale, block_sizes={-1: 32})
        elif weight.dtype == torch.uint8:
            made = NVFP4QTensor(shape, torch.float32, weight)
            double = tensors[f"{name}.weight_scale_2"]
            plain = made.dequantize(scale=scale, double_scale=double, block_sizes={-1: 16})
        elif scale.dtype == torch.uint8:
            plain = MXFP8QTensor(shape, torch.float32, weight).dequantize(scale=scale)
        elif scale.dim() == 4:
            sizes = {-1: shape[1] // scale.shape[2], -2: shape[0] // scale.shape[0]}
            made = FP8QTensor(shape, torch.float32, weight)
            plain = made.dequantize(scale=scale[:, 0, :, 0].contiguous(), block_sizes=sizes)
        else:
            plain = FP8QTensor(shape, torch.float32, weight).dequantize(
                scale=scale.reshape(-1, 1) if scale.dim() else scale
            )
        found[f"{name}.weight"] = plain.contiguous()
    return found


if __name__ == "__main__":
    kind, out, source = sys.argv[1:]
    torch.set_num_threads(1 if kind != "gptqmodel" else 2)
    readers = {"gptqmodel": gptqmodel, "awq": awq, "autoround": autoround, "modelopt": modelopt}
    readers["compressed-tensors"] = compressed_tensors
    save_file(readers[kind](source), out)
