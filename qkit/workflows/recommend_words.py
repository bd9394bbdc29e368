"""What ``qkit recommend`` says beside its table: evidence, notes, what to change where nothing fits, and the commands."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from qkit.diffusion.policy import BY_STEP
from qkit.kvcache.engine_caches import PLAIN
from qkit.planning.devices import CPU
from qkit.planning.engine_rules import LLAMA_CPP
from qkit.planning.measured_losses import measured_losses
from qkit.sensitivity.profile import Profile
from qkit.system.words import megabytes
from qkit.tensor.formats import GGUF_SCHEMES, SCHEMES
from qkit.workflows.machines import VLLM_SHARE, Machine
from qkit.workflows.recommendation import MIXED, Candidate, smallest_of

_CLOSE = 1.1  # times the memory: a scheme that needs so much more is named, where it would lose less


def evidence(profile: Profile | None, folder: Path | None) -> str:
    """What the expected losses rest on."""
    known = measured_losses()
    cached = f"KV caches cost what they cost {known.model} at {known.cache_context} tokens"
    if profile is not None:
        return f"sums over the layers of this model, by the profile in {folder}; {cached}"
    return (
        f"KL divergence of {known.model} in each scheme, measured on {known.text} with --quality {known.quality}; larger "
        f"models usually lose less; {cached}"
    )


def notes(
    plain: Candidate, found: Sequence[Candidate], chosen: Candidate | None, machine: Machine, profile: Path | None
) -> Iterator[str]:
    """What else to know."""
    if plain.fits:
        yield f"the model fits as it is, in {plain.scheme}: {megabytes(plain.total)}"
    close = [c for c in found if not c.fits and not c.refused and c.total <= _CLOSE * machine.usable]
    best = min(close, key=lambda c: (c.loss, c.total), default=None)
    if chosen is not None and best is not None and best.loss < chosen.loss:
        more = megabytes(best.total - machine.usable)
        yield f"{best.scheme} would lose {best.loss:.3g} in place of {chosen.loss:.3g}, and needs {more} more"
    if machine.engine == "vllm" and machine.usable < machine.memory:
        share = f"{VLLM_SHARE:.0%} of a GPU's memory, here {megabytes(machine.usable)}"
        of_all = f" of {machine.gpus} GPUs" if machine.gpus > 1 else ""
        yield f"vLLM uses {share}{of_all}, unless --gpu-memory-utilization says more"
    if machine.engine == LLAMA_CPP:
        yield "what a KV cache in q8_0 costs was not measured, and is not part of the expected loss"
    if machine.engine == "transformers":
        yield "transformers expands packed weights to 16 bits: the file is smaller, and its memory is not"
    yield "counted are weights, the KV cache of one sequence and activations of one block; buffers of the engine come on top"
    if profile is None:
        unknown = unmeasured(machine)
        yield f"not compared, since their loss was not measured: {', '.join(unknown)}"
        yield "with --profile (a folder of 'qkit profile') the losses are this model's own, and a mix of formats is tried"


def unmeasured(machine: Machine) -> list[str]:
    """The schemes of language models, in the engine's kind of file, whose loss is not known."""
    kind = GGUF_SCHEMES if machine.engine == LLAMA_CPP else SCHEMES
    return [name for name in kind if name not in (*measured_losses().schemes, BY_STEP)]


def remedy(found: list[Candidate], machine: Machine, context: int) -> str:
    """What to change where nothing fits."""
    smallest = smallest_of(found)
    if smallest is None:
        return "see above why each is left out"
    if machine.device is not None and machine.engine == "vllm" and machine.platform != CPU:
        ranks = 2 ** math.ceil(math.log2(smallest.total / (machine.usable / machine.gpus)))
        more = f"use --tp {ranks}"
    else:
        needed = math.ceil(smallest.total * machine.memory / machine.usable / machine.gpus / 1e6)
        more = f"use --memory {needed}MB or more"
    room, per_context = machine.usable - smallest.weights, smallest.cache_bytes + smallest.activations
    shorter = max(0, room) * context // per_context if per_context else 0
    return f"{more}, or --context {shorter} or less" if shorter else more


def tokens(chosen: Candidate | None, machine: Machine, context: int) -> int | None:
    """Tokens of KV caches that fit beside the weights, of all sequences together."""
    if chosen is None or not chosen.cache_bytes:
        return None
    return (machine.usable - chosen.weights - chosen.activations) * context // chosen.cache_bytes


def out_of(model: str, scheme: str) -> str:
    """The folder that the commands write."""
    return f"{Path(model).name or 'model'}-{scheme.lower()}"


def commands(model: str, context: int, machine: Machine, chosen: Candidate, profile: Path | None) -> Iterator[str]:
    """To make, check and serve what was chosen."""
    out, gguf = out_of(model, chosen.scheme), machine.engine == LLAMA_CPP
    words = ["qkit", "quantize", "--model", model]
    if chosen.scheme == MIXED:
        words += ["--size", f"{machine.usable - chosen.activations - chosen.cache_bytes}B", "--profile", str(profile)]
    else:
        words += ["--scheme", chosen.scheme.lower()]
    words += ["--engine", machine.engine] if chosen.scheme.upper() not in GGUF_SCHEMES else []
    words += ["--gpu", machine.gpu] if machine.gpu else []
    words += ["--tp", str(machine.gpus)] if machine.gpus > 1 else []
    words += ["--kv", "fp8"] if chosen.cache == "fp8" else []
    yield shlex.join([*words, "--out", out])
    yield shlex.join(["qkit", "verify", out])
    if gguf:
        cache = [] if chosen.cache == "f16" else ["--cache-type-k", chosen.cache, "--cache-type-v", chosen.cache]
        layers = ["--n-gpu-layers", "0"] if machine.platform == CPU else []
        yield shlex.join(["llama-server", "--model", f"{out}/model.gguf", "--ctx-size", str(context), *cache, *layers])
    elif machine.engine == "vllm":
        cache = [] if chosen.cache == PLAIN else ["--kv-cache-dtype", chosen.cache]
        ranks = ["--tensor-parallel-size", str(machine.gpus)] if machine.gpus > 1 else []
        yield shlex.join(["vllm", "serve", out, "--max-model-len", str(context), *cache, *ranks])
