"""Loads packed folders with stock transformers and compressed-tensors, in a process that never sees qkit.

python sweep_stock.py < {name: folder}: writes FOLDER.stock.safetensors, and prints {name: null, or the error}.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import sweep_inputs
import torch
import transformers
from safetensors.torch import save_file


def logits(folder: Path) -> torch.Tensor:
    """What the model gives for the inputs of the sweep, float32."""
    made = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model, report = made.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    misfits = {k: sorted(map(str, v))[:2] for k, v in report.items() if v}
    if misfits:
        raise ValueError(f"names do not fit: {misfits}")
    for p in model.parameters():  # experts come in bfloat16, and would round what they multiply
        if p.dtype == torch.bfloat16:
            p.data = p.data.float()
    return sweep_inputs.call(model.eval(), sweep_inputs.read(folder.parent / "inputs.safetensors"))


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    answers: dict[str, str | None] = {}
    for name, folder in json.load(sys.stdin).items():
        try:
            save_file({"logits": logits(Path(folder))}, f"{folder}.stock.safetensors")
            answers[name] = None
        except Exception as error:  # whatever transformers raises
            answers[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    assert not any(name.split(".")[0] == "qkit" for name in sys.modules)
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
