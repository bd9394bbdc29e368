"""The tokenizer, the chat template and the generation config: readable, and those of the baseline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkit.diagnosis.findings import Findings
from qkit.diagnosis.opened import said
from qkit.errors import QkitError
from qkit.files.folder import SIDE_LIMIT, load_json
from qkit.files.safefile import read_bytes, shown

_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
)
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_FREE = ("transformers_version", "_from_model_config", "_name_or_path")
_NOT_COMPARED = (
    *_FREE, "dtype", "torch_dtype", "use_cache", "architectures", "auto_map", "quantization_config", "compression_config",
)  # fmt: skip
_COPY = "copy it from the original"
TEMPLATE = "chat_template.jinja"


def read_object(folder: Path, name: str, findings: Findings | None = None) -> dict[str, Any] | None:
    """A JSON file of a folder; None where it is not there or cannot be read, which is noted."""
    file = folder / name
    if not file.is_file():
        return None
    try:
        value = load_json(file, name, SIDE_LIMIT)
    except QkitError as error:
        if findings is not None:
            findings.fault(
                "tokenizer" if "token" in name else "files", name, said(error), "a JSON file that can be read", _COPY, 7
            )
        return None
    return value if isinstance(value, dict) else None


def chat_template(folder: Path) -> str | None:
    """The chat template of a folder, from its own file or the tokenizer's config."""
    if (folder / TEMPLATE).is_file():
        try:
            return read_bytes(folder / TEMPLATE, SIDE_LIMIT).decode("utf-8", "replace")
        except QkitError:
            return None
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = (read_object(folder, name) or {}).get("chat_template")
        if isinstance(found, str):
            return found
        if isinstance(found, list):
            return json.dumps(found, sort_keys=True)
    return None


def template_fault(text: str) -> str | None:
    """What is wrong with the syntax of a chat template; None for nothing. It is parsed, not run."""
    import jinja2
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """The tag that marks what an assistant writes."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            """The body alone."""
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    environment = ImmutableSandboxedEnvironment(
        extensions=[Generation, ext.loopcontrols], trim_blocks=True, lstrip_blocks=True
    )
    try:
        environment.parse(text)
    except jinja2.TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    except RecursionError:
        return "it is nested too deep"
    return None


def check_side_files(folder: Path, config: Mapping[str, Any], rows: int | None, findings: Findings) -> None:
    """The files of one folder by themselves. rows: of its embeddings"""
    names = {p.name for p in folder.iterdir()}
    speaks = "vocab_size" in config or isinstance(config.get("text_config"), dict)
    if speaks and not names & set(_TOKENIZERS):
        findings.warn(
            "tokenizer", "tokenizer.json", "no file of a tokenizer is there", "the tokenizer of the model", _COPY, 4
        )
    text = chat_template(folder)
    fault = template_fault(text) if text is not None and not text.startswith("[") else None
    if fault is not None:
        findings.fault("chat template", TEMPLATE, f"it cannot be parsed: {fault}", "a jinja template", _COPY, 7)
    if speaks and "generation_config.json" not in names:
        findings.note(
            "generation config", "generation_config.json", "the file is not there: engines take their defaults"
        )
    else:
        read_object(folder, "generation_config.json", findings)
    read_object(folder, "tokenizer_config.json", findings)
    tokenizer = read_object(folder, "tokenizer.json", findings)
    highest = _highest(tokenizer) if tokenizer else None
    if highest is not None and rows is not None and highest >= rows:
        findings.fault(
            "vocabulary", "tokenizer.json", f"its tokens go up to {highest}, and the embeddings have {rows} rows",
            f"tokens below {rows}", "get the tokenizer of this model", 8,
        )  # fmt: skip
    _check_ids(config, rows, findings)


def _highest(tokenizer: Mapping[str, Any]) -> int | None:
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    ids = [i for i in vocabulary.values() if isinstance(i, int)] if isinstance(vocabulary, dict) else []
    ids += [len(vocabulary) - 1] if isinstance(vocabulary, list) else []
    ids += [
        a["id"] for a in tokenizer.get("added_tokens") or () if isinstance(a, dict) and isinstance(a.get("id"), int)
    ]
    return max(ids, default=None)


def _check_ids(config: Mapping[str, Any], rows: int | None, findings: Findings) -> None:
    for key in _IDS:
        value = config.get(key)
        for number in value if isinstance(value, list) else [value]:
            if rows is not None and isinstance(number, int) and not isinstance(number, bool) and number >= rows:
                findings.fault(
                    "vocabulary", f"config.json: {key}", f"{number}, and there are {rows} embeddings", f"a token below {rows}",
                    "get the config of this model", 7,
                )  # fmt: skip


# ---- against the baseline ------------------------------------------------------------------------------------------


def compare_side_files(folder: Path, base: Path, findings: Findings) -> None:
    """The same files of the original."""
    _compare_templates(folder, base, findings)
    _compare_generation(folder, base, findings)
    _compare_tokenizers(folder, base, findings)


def _compare_templates(folder: Path, base: Path, findings: Findings) -> None:
    mine, theirs = chat_template(folder), chat_template(base)
    if theirs is not None and mine is None:
        findings.fault(
            "chat template",
            TEMPLATE,
            "there is none, and the original has one",
            "the template of the original",
            _COPY,
            6,
        )
    elif theirs is None and mine is not None:
        findings.warn("chat template", TEMPLATE, "the original has none", "no template", "check where it comes from", 4)
    elif theirs is not None and mine is not None and mine.strip() != theirs.strip():
        findings.warn(
            "chat template", TEMPLATE, "it is not that of the original", "the template of the original", _COPY, 5
        )


def _compare_generation(folder: Path, base: Path, findings: Findings) -> None:
    mine, theirs = read_object(folder, "generation_config.json"), read_object(base, "generation_config.json")
    if theirs is None:
        return
    if mine is None:
        findings.warn(
            "generation config",
            "generation_config.json",
            "there is none, and the original has one",
            "that file",
            _COPY,
            4,
        )
        return
    for key in sorted({*mine, *theirs} - set(_FREE)):
        if mine.get(key) != theirs.get(key):
            findings.warn(
                "generation config", f"generation_config.json: {key}", shown(mine.get(key)), f"{shown(theirs.get(key))}, as "
                "the original has it", _COPY, 4,
            )  # fmt: skip


def _compare_tokenizers(folder: Path, base: Path, findings: Findings) -> None:
    lost = [n for n in _TOKENIZERS if (base / n).is_file() and not (folder / n).is_file()]
    if lost and not any((folder / n).is_file() for n in _TOKENIZERS):
        findings.fault(
            "tokenizer",
            lost,
            "the file is not there, and the original has it",
            "the tokenizer of the original",
            _COPY,
            6,
        )
        return
    mine, theirs = read_object(folder, "tokenizer.json"), read_object(base, "tokenizer.json")
    if mine is not None and theirs is not None:
        vocabularies = [(t.get("model") or {}).get("vocab") for t in (mine, theirs)]
        if vocabularies[0] != vocabularies[1]:
            findings.fault(
                "tokenizer", "tokenizer.json", "its vocabulary is not that of the original", "the same tokens", _COPY, 7
            )
        added = [{a.get("id"): a.get("content") for a in t.get("added_tokens") or ()} for t in (mine, theirs)]
        if added[0] != added[1]:
            findings.warn(
                "tokenizer",
                "tokenizer.json",
                "its added tokens are not those of the original",
                "the same tokens",
                _COPY,
                5,
            )
    settings = [read_object(f, "tokenizer_config.json") or {} for f in (folder, base)]
    for key in _SPECIAL:
        found, wanted = (_token(s.get(key)) for s in settings)
        if found != wanted and settings[0]:
            findings.warn(
                "special tokens",
                f"tokenizer_config.json: {key}",
                shown(found),
                f"{shown(wanted)}, as the original has it",
                _COPY,
                5,
            )


def _token(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def compare_configs(mine: Mapping[str, Any], theirs: Mapping[str, Any], findings: Findings, at: str = "") -> None:
    """Fields of config.json, at any depth, that change what the model computes. at: the keys around these"""
    for key in sorted({*mine} & {*theirs} - set(_NOT_COMPARED)):
        found, wanted = mine[key], theirs[key]
        if isinstance(found, dict) and isinstance(wanted, dict):
            compare_configs(found, wanted, findings, f"{at}{key}.")
        elif found != wanted and wanted is not None:
            findings.warn(
                "config", f"config.json: {at}{key}", shown(found), f"{shown(wanted)}, as the original has it",
                "set it as in the original, unless the change is meant", 5,
            )  # fmt: skip
