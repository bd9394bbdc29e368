"""Runs a model in transformers with compressed-tensors, in an interpreter of its own that has no qkit.

python -I transformers_script.py JOB.json ANSWER.json, as ``process.run_engine`` calls it: the job says what to run, the answer
holds log-probabilities of tokens of every prompt, greedy tokens, and what runs each layer. A job without prompts asks only
whether the packages are here.
"""

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "compressed_tensors")


def layers_of(model: Any) -> dict[str, dict[str, str]]:
    """What runs every linear layer by its name. A layer that compressed-tensors runs has a scheme, others a weight alone."""
    from torch import nn

    layers = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None and not isinstance(module, nn.Linear):
            continue
        layers[name] = {"class": type(module).__name__}
        if scheme is not None:
            status = getattr(module, "quantization_status", None)
            form = getattr(scheme.format, "value", None) or "quantized"
            layers[name] |= {"scheme": str(form), "kernel": f"{getattr(status, 'value', status)} weights"}
    return layers


def scores(model: Any, ids: Any, count: int) -> tuple[list[float], list[bool]]:
    """Log-probabilities of the last ``count`` tokens, and whether each is the most likely one."""
    if not count:
        return [], []
    logits = model(input_ids=ids[None]).logits[0, -count - 1 : -1].float()
    last = ids[-count:]
    found = logits.log_softmax(-1).gather(1, last[:, None])[:, 0]
    return [float(x) for x in found], [bool(x) for x in logits.argmax(-1) == last]


def continued(model: Any, ids: Any, count: int, stops: list[int]) -> list[int]:
    """So many greedy tokens, or fewer where one of ``stops`` is the last."""
    if not count:
        return []
    # The model's own settings may ask for more than the most likely token, and end a text where nothing is to.
    kind = type(model.generation_config)
    least = None if stops else count
    settings = kind(
        do_sample=False, max_new_tokens=count, min_new_tokens=least, eos_token_id=stops or None, pad_token_id=0
    )
    made = model.generate(ids[None], generation_config=settings)
    return [int(x) for x in made[0, len(ids) :]]


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The answer to a job. Raises ValueError where tensors of the file and the model do not fit."""
    import torch
    import transformers

    start = time.perf_counter()
    transformers.logging.disable_progress_bar()
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"],
        dtype=getattr(torch, job["dtype"]),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are named below
    )
    unused = sorted(map(str, report.pop("unexpected_keys", None) or ()))
    unfit = [(kind.replace("_", " "), entry) for kind, entries in report.items() for entry in entries or ()]
    if unfit:
        kind, entry = unfit[0]
        name = entry[0] if isinstance(entry, (tuple, list)) else entry
        raise ValueError(f"{len(unfit)} tensors of the file do not fit the model, first {name} ({kind})")
    model.eval()
    loaded = time.perf_counter()
    prompts = [torch.tensor(ids) for ids in job["prompts"]]
    with torch.inference_mode():
        scored = [scores(model, *pair) for pair in zip(prompts, job["scored"], strict=True)]
        tokens = [continued(model, *entry) for entry in zip(prompts, job["new_tokens"], job["stops"], strict=True)]
    return {
        "version": transformers.__version__,
        "device": str(model.device),
        "dtype": job["dtype"],
        "logprobs": [row for row, _ in scored],
        "best": [row for _, row in scored],
        "tokens": tokens,
        "seconds": {"load": loaded - start, "run": time.perf_counter() - loaded},
        "layers": layers_of(model),
        "unused": unused,
    }


def main(job_file: str, answer_file: str) -> None:
    """Writes the answer, or why there is none."""
    job = json.loads(Path(job_file).read_text())
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        answer: dict[str, Any] = {"missing": missing[0]}
    elif not job["prompts"]:
        answer = {"found": True}
    else:
        try:
            answer = run(job)
        except Exception as e:  # whatever transformers raises is its answer
            Path(answer_file).write_text(json.dumps({"refused": f"{type(e).__name__}: {e}"}))
            raise
    Path(answer_file).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
