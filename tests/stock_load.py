"""Loads packed checkpoints with stock transformers and compressed-tensors, in a process that never sees qkit.

python stock_load.py JOBS.json: {'tokens': [[int]], 'loads': [[folder, dtype]]}; writes FOLDER.DTYPE.safetensors with the
logits, and to JOBS.json.out {'folder|dtype': null, or the error}.
"""

import json
import sys
import warnings

import torch
import transformers
from safetensors.torch import save_file


def logits(folder: str, dtype: str, tokens: torch.Tensor) -> torch.Tensor:
    kind = transformers.AutoModelForCausalLM
    model, report = kind.from_pretrained(folder, dtype=getattr(torch, dtype), output_loading_info=True)
    missing = {k: sorted(map(str, v))[:3] for k, v in report.items() if v}
    if missing:
        raise ValueError(f"keys do not fit: {missing}")
    with torch.inference_mode():
        return model(input_ids=tokens).logits.float().contiguous()


def main(path: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with open(path) as f:
        jobs = json.load(f)
    tokens, found = torch.tensor(jobs["tokens"]), {}
    for folder, dtype in jobs["loads"]:
        found[f"{folder}|{dtype}"] = None
        try:
            save_file({"logits": logits(folder, dtype, tokens)}, f"{folder}.{dtype}.safetensors")
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as e:
            found[f"{folder}|{dtype}"] = f"{type(e).__name__}: {e}"
    assert not any(name.split(".")[0] == "qkit" for name in sys.modules)
    with open(f"{path}.out", "w") as f:
        json.dump(found, f)


if __name__ == "__main__":
    main(sys.argv[1])
