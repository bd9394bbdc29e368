"""What the card (README.md) of a result says of its quantization: a section behind the card of the source, which stays.

Everything in it is in the plan: nothing is measured for it, and it names no folder of this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from qkit.families.structure import ModelStructure
from qkit.files.card import CACHE, CARD, FIGURES, QUANTIZATION, read_card, section, with_section, without_sections
from qkit.files.card_head import LAYOUT_TAGS, with_head
from qkit.files.folder import hub_source
from qkit.files.gguf_container import MODEL
from qkit.files.safefile import write_atomic
from qkit.files.side_files import MODULES, RECIPE
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

_LOADING = b"\nHow to load it:\n"  # begins the end of a section: what another layout changes
_LIBRARIES = {GGUF: "gguf", "mlx": "mlx"}
_TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
}
_PROVEN = "Every weight was decoded again by an independent program and compared with the one that was meant."
_FOLDER = "FOLDER is a copy of these files."
_NAMED = 4  # layers that a line names


def write_card(
    folder: Path, files: dict[str, str], make: Callable[[bytes], bytes], edited: bytes | None = None
) -> None:
    """Write the card that ``make`` gives for the one of the source, or for one that was ``edited``.

    files: {name: sha256} of what is in the folder, with the card of the source if that was copied; it gets the card that qkit
    alone would have written, so that an edited one stays known as such
    """
    card = make(read_card(folder) if CARD in files else b"")
    files[CARD] = sha256(card).hexdigest()
    write_atomic(folder / CARD, card if edited is None else make(edited))


def result_card(before: bytes, plan: Plan, structure: ModelStructure, size: int, command: str) -> bytes:
    """The card with the section. before: the card of the source, or nothing; size: bytes of the tensors, or of the GGUF file;
    command: that of recipe.yaml"""
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
        f"How it was made: `{RECIPE}` has every setting, and makes the same weights again:",
        "",
        f"    {command}",
    ]
    said = _text(lines) + _LOADING + _text([_FOLDER, "", *_loading(plan, structure)])
    before = without_sections(before, CACHE, FIGURES)  # what was measured of other weights
    return with_section(with_head(before, *_head(plan, structure)), QUANTIZATION, said)


def converted_card(before: bytes, export: str, edited: bytes | None = None) -> bytes:
    """The card of the same weights in another layout: how they were quantized stays, how they are loaded does not. edited: the
    card that this one goes on from, in place of that of the source"""
    found = section(before, QUANTIZATION)
    made = found.partition(_LOADING)[0] + b"\n" if found else b"## Converted with qkit\n"
    lines = [
        "",
        f"Written in the layout {export} by qkit {__version__} (`qkit convert`), with the same codes and scales. {_PROVEN}",
        "`qkit verify FOLDER` checks every byte and lists the engines that load it.",
    ]
    card = with_head(before if edited is None else edited, {}, {"tags": ["qkit", export]}, drop=LAYOUT_TAGS)
    return with_section(card, QUANTIZATION, made + _text(lines))


def _head(plan: Plan, structure: ModelStructure) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the hub reads of a card: (fields that this result decides, fields for a card that has none; lists are added to).

    The licence and all else of the source's card stays.
    """
    checkpoint = structure.checkpoint
    repository = hub_source(checkpoint.path).get("repository")
    decided = {} if repository is None else {"base_model": repository, "base_model_relation": "quantized"}
    library = _LIBRARIES.get(plan.export)
    decided |= {} if library is None else {"library_name": library}
    widths = {p.weights.bits for p in plan.linears.values()}
    tags = ["qkit", plan.export, *dict.fromkeys(p.scheme.lower() for p in plan.linears.values())]
    tags += [f"{width}-bit" for width in widths if len(widths) == 1]
    wanted: dict[str, Any] = {"tags": list(dict.fromkeys(tags))}
    if plan.pipeline is not None:
        wanted["library_name"] = "diffusers"
    elif library is None:
        wanted["library_name"] = "sentence-transformers" if MODULES in checkpoint.side_files else "transformers"
    kind = type(structure.model).__name__
    task = next((task for end, task in _TASKS.items() if kind.endswith(end)), None)
    if structure.is_language_model:
        task = "image-text-to-text" if structure.family.text_types else "text-generation"
    return decided, wanted if task is None else {**wanted, "pipeline_tag": task}


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


def _code(text: str) -> str:
    return f"`{_line(text).replace('`', chr(39))}`"


def _line(text: str) -> str:
    """Text of a file in one line of Markdown."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
