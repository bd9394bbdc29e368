"""What MLX makes of a folder in its layout: the plain weights, or the logits of a model.

Runs on a CPU in an environment with mlx and mlx-lm, without qkit:
    PYTHON mlx_reader.py weights OUT.safetensors FOLDER
    PYTHON mlx_reader.py logits OUT.safetensors FOLDER TOKENS.json [DTYPE]
weights: float32, of every quantized matrix, by ``mlx.core.dequantize`` with the scales and biases of the file in float32.
logits: of the rows of token numbers in TOKENS.json, by the model that mlx_lm loads, in float32; DTYPE: what the model is cast
to first. Which classes hold the quantized matrices is printed as JSON.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model


def weights(folder: str) -> dict[str, mx.array]:
    """{tensor: plain weight}"""
    tensors: dict[str, mx.array] = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        tensors.update(mx.load(str(file)))
    said = json.loads((Path(folder) / "config.json").read_text())["quantization"]
    found = {}
    for name in [n.removesuffix(".scales") for n in tensors if n.endswith(".scales")]:
        setting = said.get(name, said)
        scales, biases = tensors[f"{name}.scales"], tensors.get(f"{name}.biases")
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        found[f"{name}.weight"] = mx.dequantize(
            tensors[f"{name}.weight"], scales, biases, setting["group_size"], setting["bits"],
            setting.get("mode", "affine"), dtype=mx.float32,
        )  # fmt: skip
    return found


def logits(folder: str, tokens: str, dtype: str | None = None) -> dict[str, mx.array]:
    """{"logits": [rows, tokens, vocabulary]}"""
    model, _ = load_model(Path(folder))
    classes = Counter(type(m).__name__ for _, m in model.named_modules() if "scales" in m)
    print(json.dumps(classes))
    if dtype is not None:
        model.set_dtype(getattr(mx, dtype))
    rows = mx.array(json.loads(Path(tokens).read_text()))
    return {"logits": model(rows).astype(mx.float32)}


if __name__ == "__main__":
    kind, out, *rest = sys.argv[1:]
    mx.set_default_device(mx.cpu)
    mx.save_safetensors(out, {"weights": weights, "logits": logits}[kind](*rest))
