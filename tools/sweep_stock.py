"""Loads packed folders with stock transformers and compressed-tensors, in a process that never sees qkit.

python sweep_stock.py KIND < {name: folder}: writes FOLDER.stock.safetensors, and prints {name: null, or the error}.
"""

from __future__ import annotations

import json
import sys
import warnings

import sweep_configs as configs
import torch
import transformers
from safetensors.torch import save_file


def logits(kind: str, folder: str) -> torch.Tensor:
    """What the model gives for the inputs of the sweep, float32."""
    with open(f"{folder}/config.json") as f:
        made = getattr(transformers, json.load(f)["architectures"][0])
    model, report = made.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    misfits = {k: sorted(map(str, v))[:2] for k, v in report.items() if v}
    if misfits:
        raise ValueError(f"names do not fit: {misfits}")
    for p in model.parameters():  # experts come in bfloat16, and would round what they multiply
        if p.dtype == torch.bfloat16:
            p.data = p.data.float()
    with torch.inference_mode():
        return configs.result(model.eval()(**configs.inputs(kind, model), use_cache=False)).contiguous()


def main(kind: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    answers: dict[str, str | None] = {}
    for name, folder in json.load(sys.stdin).items():
        try:
            save_file({"logits": logits(kind, folder)}, f"{folder}.stock.safetensors")
            answers[name] = None
        except Exception as error:  # whatever transformers raises
            answers[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    assert not any(name.split(".")[0] == "qkit" for name in sys.modules)
    print(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1])
