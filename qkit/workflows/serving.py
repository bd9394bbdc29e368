"""The command line that serves a result: ``qkit serve-command``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkit.engines.process import ENGINES, require_engine
from qkit.errors import BadCheckpoint, Unsupported, UsageError
from qkit.files.checkpoint import Checkpoint
from qkit.files.folder import is_pipeline, read_record
from qkit.files.gguf import read_gguf
from qkit.verification.mlx_table import MLX_LM
from qkit.verification.model_engines import engine_lines
from qkit.verification.verify import engine_table
from qkit.workflows.card import ENTRY

_MODULE = "vllm.entrypoints.openai.api_server"
_FOREIGN = "another tool wrote this file, and whether vLLM loads it was not looked at: 'qkit doctor {}' does that"


@dataclass(frozen=True)
class ServeCommand:
    """command: for a shell; notes: limits that the engine has with this file"""

    command: str
    notes: tuple[str, ...] = ()


def serve_command(out: Path, tp: int = 1, context: int | None = None, python: Path | None = None) -> ServeCommand:
    """The command line of vLLM for a folder, or of llama.cpp for a GGUF file.

    tp: GPUs that share the model; context: the longest text in tokens, None for the longest of the model; python: the
    interpreter with vLLM, whose module is started in place of the program ``vllm``, which does not start in some builds

    Raises BadCheckpoint where there is nothing, Unsupported for a file that vLLM does not load, UsageError for a split or a
    length that the model does not allow.
    """
    if not out.exists():
        raise BadCheckpoint(f"{out}: no such folder or file: use the folder of a result")
    file = gguf_file(out)
    if file is not None:
        if python is not None:
            raise UsageError(f"--python {python}: llama.cpp serves GGUF files, and it is a program: leave --python out")
        return _llama_cpp(file, tp, context)
    if is_pipeline(out):
        raise Unsupported(f"{out}: a diffusion pipeline, which vLLM does not serve: load it with diffusers")
    config = Checkpoint.open(out, quantized=True).config
    inner = config.get("text_config")
    facts: Mapping[str, Any] = inner if isinstance(inner, Mapping) else config
    notes = _vllm_notes(out, config)
    _check_split(out, facts, tp)
    longest = facts.get("max_position_embeddings")
    _check_length(out, longest, context)
    length = context or longest
    words = ["vllm", "serve", str(out)]
    if python is not None:
        require_engine(ENGINES["vllm"], python)
        words = [str(python), "-m", _MODULE, "--model", str(out)]
    words += ["--max-model-len", str(length)] if isinstance(length, int) else []
    cache, said = _cache_words(out, config, facts, length)
    words += cache
    words += ["--tensor-parallel-size", str(tp)] if tp > 1 else []
    return ServeCommand(shlex.join(words), (*notes, *said))


def gguf_file(out: Path) -> Path | None:
    """The GGUF file that ``out`` is, or that lies in it."""
    file = out / "model.gguf" if (out / "model.gguf").is_file() else out
    return file if file.suffix == ".gguf" and file.is_file() else None


def _llama_cpp(file: Path, tp: int, context: int | None) -> ServeCommand:
    """Context 0 is the longest of the model. Raises BadCheckpoint for a file that is damaged."""
    header = read_gguf(file)
    end = max((t.begin + (t.nbytes or 0) for t in header.tensors), default=0)
    if end > file.stat().st_size:
        raise BadCheckpoint(f"{file}: {file.stat().st_size} bytes, expected at least {end}: make or get the file again")
    _check_length(file, header.values.get(f"{header.values.get('general.architecture')}.context_length"), context)
    if tp > 1:
        raise UsageError(f"--tp {tp}: llama.cpp shares a model out over GPUs by itself: leave --tp out")
    return ServeCommand(shlex.join(["llama-server", "--model", str(file), "--ctx-size", str(context or 0)]))


def _cache_words(
    out: Path, config: Mapping[str, Any], facts: Mapping[str, Any], length: Any
) -> tuple[list[str], tuple[str, ...]]:
    """(options for the KV cache, notes): what was measured for this folder, else what its scales are for."""
    scaled = (config.get("quantization_config") or {}).get("kv_cache_scheme") is not None
    measured = (read_record(out) or {}).get(ENTRY)
    if not isinstance(measured, Mapping):
        return (["--kv-cache-dtype", "fp8"] if scaled else []), ()
    chosen: Mapping[str, Any] = measured["chosen"]
    dtype, skip, context = str(chosen["dtype"]), [str(i) for i in chosen["skip"]], measured["context"]
    if dtype == "auto" and scaled:  # which to vLLM means fp8 where a file has scales
        stored = str(facts.get("dtype") or facts.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype"))
        dtype = "float16" if stored.endswith("float16") and not stored.endswith("bfloat16") else "bfloat16"
    words = ["--kv-cache-dtype", dtype] if dtype != "auto" else []
    words += ["--kv-cache-dtype-skip-layers", *skip] if skip else []
    said = f"the KV cache costs {chosen['kl']:.2g} nats a token at {context} tokens (KL divergence to 16 bits)"
    runs = f"{dtype} runs on {chosen['runs']}" if words else ""
    longer = isinstance(length, int) and length > context
    more = f"the KV cache was measured at {context} tokens, and the context here is {length}" if longer else ""
    return words, tuple(x for x in (said, runs, more) if x)


def _vllm_notes(out: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The limits of vLLM with the formats of a folder that qkit wrote. Raises Unsupported where it does not load it."""
    if read_record(out) is None:
        return (_FOREIGN.format(out),) if config.get("quantization_config") else ()
    lines = {line.engine: line for line in engine_lines(engine_table(out))}
    line = lines.get("vLLM")
    if line is None:
        return ()
    if not line.loads:
        server = "mlx_lm.server, " if MLX_LM in lines and lines[MLX_LM].loads else ""
        raise Unsupported(
            f"{out}: vLLM does not load it ({'; '.join(line.notes)}): use {server}qkit.load, or another scheme"
        )
    return line.notes


def _check_length(out: Path, longest: Any, context: int | None) -> None:
    if isinstance(longest, int) and (context or 0) > longest:
        raise UsageError(f"--context {context}: the model in {out} has {longest} positions: use at most so many")


def _check_split(out: Path, facts: Mapping[str, Any], tp: int) -> None:
    """vLLM gives every GPU the same number of heads."""
    heads = facts.get("num_attention_heads")
    if isinstance(heads, int) and heads % tp:
        raise UsageError(
            f"--tp {tp}: the model in {out} has {heads} attention heads, and every GPU needs as many: use another"
        )
