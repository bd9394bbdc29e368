"""What is shared by the verbs that run an engine: its options, and what it gave as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from qkit.commands.grid import print_wide, printable, wide_table
from qkit.errors import UsageError
from qkit.files.folder import GGUF_MODEL

if TYPE_CHECKING:
    from qkit.workflows.engine_proof import Difference, EngineProof

LLAMA_CPP = "llama.cpp"
_SHOWN = 3  # names of layers on the terminal; --json has them all


def require_python(engine: str | None, python: Path | None) -> tuple[str, Path] | None:
    """The engine and its interpreter, None where no engine is asked for. Raises UsageError for one of the two alone."""
    if engine is None and python is None:
        return None
    if engine is None or python is None:
        given, other = ("--python", "--engine NAME") if engine is None else ("--engine", "--python VENV/bin/python")
        raise UsageError(f"{given} needs {other}: add it, or leave {given} out")
    return engine, python


def gguf_file(out: Path, engine: str | None) -> Path | None:
    """The GGUF file that llama.cpp runs: ``out`` itself, or model.gguf in it; None for another engine. Raises UsageError where
    the engine and the file do not go together."""
    file = out / GGUF_MODEL if out.is_dir() else out
    is_gguf = file.suffix == ".gguf" and file.is_file()
    if engine is None or (engine != LLAMA_CPP and not is_gguf):
        return None
    if not out.exists():
        raise UsageError(f"{out}: no such folder or file: use the folder of a result, or a GGUF file")
    if engine != LLAMA_CPP:
        raise UsageError(f"--engine {engine}: {file} is a GGUF file: use --engine {LLAMA_CPP}")
    if not is_gguf:
        raise UsageError(
            f"--engine {LLAMA_CPP}: {out} is no GGUF file and has no {GGUF_MODEL}: use vllm or transformers"
        )
    return file


def show_engine(run: Mapping[str, Any], console: Console) -> None:
    """Prints which engine ran a model, and what ran its layers."""
    seconds = ", ".join(f"{what} {time:.0f} s" for what, time in run["seconds"].items())
    cache = f", KV cache {run['cache']}" if run.get("cache") else ""
    cache += f", texts of up to {run['context']} tokens" if "context" in run else ""
    about = f"by {run['name']} {run['version']}, {run['device']}, {run['dtype']}{cache} ({seconds})"
    console.print(Text(printable(about)), soft_wrap=True)
    if run["kernels"]:
        kernels = wide_table("what runs the layers", "layers")
        for name, count in run["kernels"].items():
            kernels.add_row(Text(printable(name)), Text(str(count)))
        print_wide(console, kernels)


def show_proof(proof: EngineProof, console: Console) -> None:
    """Prints what ran the layers, and the differences beside what is allowed."""
    if proof.difference is None or proof.noise is None:
        return
    show_engine({**asdict(proof), "name": proof.engine}, console)
    title = f"{proof.texts} texts, {proof.tokens} log-probabilities, nats"
    table = wide_table("difference", "mean", "largest", "mean with sign", title=title)
    rows: list[tuple[str, Difference]] = [
        (f"{proof.engine} and qkit", proof.difference),
        ("noise of the file", proof.noise),
    ]
    for name, d in rows:
        table.add_row(*map(Text, (name, f"{d.mean:.4g}", f"{d.largest:.4g}", f"{d.bias:+.4g}")))
    table.add_row(*map(Text, ("allowed", *(f"{limit:.4g}" for limit in proof.limits), "")))
    print_wide(console, table)
    same = ", ".join(map(str, proof.same_tokens))
    console.print(Text(f"greedy tokens that are the same, of {proof.new_tokens} for each text: {same}"), soft_wrap=True)
    if proof.unquantized:
        names = ", ".join(map(printable, proof.unquantized[:_SHOWN]))
        console.print(Text(f"note: packed in the file and run as plain layers: {len(proof.unquantized)}: {names}"))
    for note in proof.notes:
        console.print(Text(f"note: {proof.engine}: {printable(note)}"), soft_wrap=True)
    if proof.ok:
        console.print(Text(proof.verdict), soft_wrap=True)
