"""What the card (README.md) of a result says of its quantization: a section behind the card of the source, which stays.

Everything in it is in the plan: nothing is measured for it, and it names no folder of this machine.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from qkit.families.structure import ModelStructure
from qkit.files.folder import hub_source
from qkit.files.gguf_container import MODEL
from qkit.files.safefile import read_bytes, write_atomic
from qkit.files.side_files import MOST_BYTES
from qkit.kvcache.policy import CachePolicy
from qkit.planning.fused_layers import engine_lines_of
from qkit.planning.gguf import GGUF
from qkit.planning.linear_plan import LinearPlan
from qkit.planning.plan import Plan
from qkit.planning.sizes import linear_bytes
from qkit.system.version import __version__
from qkit.system.words import megabytes
from qkit.verification.mlx_table import MLX_LM
from qkit.verification.model_engines import EngineLine

CARD = "README.md"
_BEGIN, _END = b"\n<!-- qkit: quantization -->\n", b"<!-- /qkit: quantization -->\n"
_SECTION = re.compile(re.escape(_BEGIN) + b".*?" + re.escape(_END), re.DOTALL)
_LOADING = b"\nHow to load it:\n"  # begins the end of a section: what another layout changes
_HEAD = re.compile(rb"\A---\r?\n(.*?)^---\r?\n", re.DOTALL | re.MULTILINE)
_BASE = re.compile(rb"^base_model(_relation)?:.*\n([ \t-].*\n)*", re.MULTILINE)
_FLAGS = ("scheme", "method", "group_size", "export", "embeddings", "head", "unloaded", "outliers", "rank", "significant",
          "expert_share", "prune_experts", "gpu")  # fmt: skip
_PROVEN = "Every weight was decoded again by an independent program and compared with the one that was meant."
_NAMED = 4  # layers that a line names


def write_card(folder: Path, files: dict[str, str], make: Callable[[bytes], bytes]) -> None:
    """Write the card that ``make`` gives for the one of the source. files: {name: sha256} of what is in the folder, with the
    card of the source if that was copied"""
    card = make(read_bytes(folder / CARD, MOST_BYTES) if CARD in files else b"")
    write_atomic(folder / CARD, card)
    files[CARD] = sha256(card).hexdigest()


def result_card(before: bytes, plan: Plan, structure: ModelStructure, size: int) -> bytes:
    """The card with the section. before: the card of the source, or nothing; size: bytes of the tensors, or of the GGUF file"""
    lines = [
        "## Quantized with qkit",
        "",
        f"Written by qkit {__version__}. {_PROVEN}",
        "",
        *_table(plan, structure),
        "",
        f"- Method: {_method(plan)}.",
        f"- Calibration: {_calibration(plan)}.",
        *([] if plan.kv is None else [f"- KV cache: {CachePolicy.from_json(plan.kv).name}."]),
        f"- Size: {megabytes(plan.source_bytes)} before, {megabytes(size)} after.",
        *_skipped(plan.skipped),
        "",
        "How it was made:",
        "",
        f"    {_command(plan, structure)}",
    ]
    section = _text(lines) + _LOADING + _text(["", *_loading(plan, structure)])
    return _with_base(_SECTION.sub(b"", before), structure) + _BEGIN + section + _END


def converted_card(before: bytes, export: str) -> bytes:
    """The card of the same weights in another layout: how they were quantized stays, how they are loaded does not."""
    found = _SECTION.search(before)
    made = found[0].partition(_LOADING)[0] if found else _BEGIN + b"## Converted with qkit\n"
    lines = [
        "",
        f"Written in the layout {export} by qkit {__version__} (`qkit convert`), with the same codes and scales. {_PROVEN}",
        "`qkit verify FOLDER` checks every byte and lists the engines that load it.",
    ]
    return _SECTION.sub(b"", before) + made.removesuffix(_END) + _text(lines) + _END


def _text(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def _table(plan: Plan, structure: ModelStructure) -> Iterator[str]:
    """One row for each scheme, with the kinds of layers that have it."""
    kinds: dict[tuple[str, str, str, str], list[LinearPlan]] = {}
    for p in plan.packed.values():
        inputs = "16 bits" if p.activations is None else str(p.activations)
        scheme = p.weights.ggml if plan.export == GGUF else p.scheme.upper()
        kinds.setdefault((scheme, str(p.weights), inputs, p.solver), []).append(p)
    yield "| scheme | weights | inputs | solver | layers | matrices | weights (M) | bits per weight |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for key, planned in kinds.items():
        weights = sum(p.shape[0] * p.shape[1] for p in planned)
        stored = sum(
            linear_bytes(p.weights, p.activations, p.shape, structure.dtype, p.outliers, p.rank, plan.export)
            for p in planned
        )
        layers = ", ".join(dict.fromkeys(_code(p.name.rpartition(".")[2]) for p in planned))
        cells = (*key, layers, str(len(planned)), f"{weights / 1e6:.2f}", f"{8 * stored / weights:.3f}")
        yield f"| {' | '.join(cells)} |"


def _method(plan: Plan) -> str:
    options = {name: value for p in plan.linears.values() for name, value in p.options.items()}
    listed = f" with {', '.join(f'`{name}={value}`' for name, value in sorted(options.items()))}" if options else ""
    return f"{plan.recipe['method']}{listed}"


def _calibration(plan: Plan) -> str:
    data = plan.calibration
    if data is None:
        return "none, the method looks at the weights alone"
    tokens = f" of {data.seqlen} tokens" if data.seqlen else ""
    written = f", and {data.written} that the model wrote itself" if data.written else ""
    return f"{data.samples} samples{tokens} of {_line(data.source)}{written}"


def _skipped(skipped: Mapping[str, str]) -> Iterator[str]:
    """Layers that stay as they were, by their reasons."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        shown = ", ".join(_code(name) for name in names[:_NAMED])
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        yield f"- Not quantized: {shown}{more}: {_line(reason)}."


def _command(plan: Plan, structure: ModelStructure) -> str:
    """The command line that makes the same result, from the settings of the plan."""
    recipe = plan.recipe
    words = ["qkit", "quantize", "--model", hub_source(structure.checkpoint.path).get("repository", "MODEL")]
    for name in _FLAGS:
        value = recipe.get(name)
        if value and not isinstance(value, Mapping):
            words += [f"--{name.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else str(value)]
    words += ["--engine", recipe["engine"]] if recipe["engine"] != "default" else []
    words += ["--tp", str(recipe["tp"])] if recipe["tp"] > 1 else []
    words += [w for name, value in sorted(recipe["options"].items()) for w in ("--option", f"{name}={value}")]
    words += [w for name, value in sorted(recipe["targets"].items()) for w in ("--target", f"{name}={value}")]
    layers = recipe["rules"] or any(isinstance(recipe.get(name), Mapping) for name in ("outliers", "rank"))
    words += ["--recipe", "RECIPE.yaml"] if layers or recipe["policy"] else []
    words += ["--seed", str(plan.seed)] if plan.seed else []
    words += [] if plan.kv is None else ["--kv", CachePolicy.from_json(plan.kv).name]
    data = plan.calibration
    if data is not None and data.seqlen:
        own = data.source.startswith("embedded")
        words += [] if own else [w for of in data.understood for w in ("--calib", str(of["source"]))]
        words += ["--samples", str(data.samples), "--seqlen", str(data.seqlen)]
    return shlex.join([*words, "--out", "OUT"])


def _loading(plan: Plan, structure: ModelStructure) -> Iterator[str]:
    """One line for every engine that loads the result, then those that do not."""
    lines: Sequence[EngineLine] = sorted(engine_lines_of(plan, structure), key=lambda line: not line.loads)
    for line in lines:
        notes = f" ({_line('; '.join(line.notes))})" if line.notes else ""
        if line.loads:
            loader = "AutoModelForCausalLM" if structure.is_language_model else type(structure.model).__name__
            yield f"- {line.engine}: {how_to_load(line.engine, loader, plan.export == GGUF)}{notes}"
        else:
            yield f"- {line.engine} does not load it{notes}"


def how_to_load(engine: str, loader: str = "AutoModelForCausalLM", gguf: bool = False) -> str:
    """What one types, in a shell or in Python. loader: the class of transformers that loads the model"""
    if engine == "vLLM":
        return "`vllm serve FOLDER`"
    if engine == "llama.cpp":
        return f"`llama-server --model {MODEL}`"
    if engine == MLX_LM:
        return "`mlx_lm.server --model FOLDER`"
    if engine == "qkit":
        return '`qkit.load("FOLDER")`, and `qkit verify FOLDER` checks every byte'
    if engine == "diffusers":
        return '`import qkit`, then `DiffusionPipeline.from_pretrained("FOLDER")`'
    return f'`{loader}.from_pretrained("FOLDER"{f", gguf_file={MODEL!r}" if gguf else ""})`'


def _with_base(card: bytes, structure: ModelStructure) -> bytes:
    """The card whose head says what this is a quantized version of, where the source is a repository of the hub."""
    repository = hub_source(structure.checkpoint.path).get("repository")
    if repository is None:
        return card
    head = _HEAD.match(card)
    base = f"base_model: {repository}\nbase_model_relation: quantized\n".encode()
    kept, rest = (_BASE.sub(b"", head[1]), card[head.end() :]) if head else (b"", card)
    return b"---\n" + kept + base + b"---\n" + rest


def _code(text: str) -> str:
    return f"`{_line(text).replace('`', chr(39))}`"


def _line(text: str) -> str:
    """Text of a file in one line of Markdown."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
