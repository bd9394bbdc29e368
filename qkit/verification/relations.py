"""The checks of tied weights, and of a packed folder against the journal of its job.

Part of the independent proof (see ``verify.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkit.errors import BadCheckpoint
from qkit.verification.decode import DecodedLinear, StoredTensor
from qkit.verification.record import Findings, Record, is_hash
from qkit.verification.strict_json import parse_json


def config_value(config: Mapping[str, Any], key: str) -> Any:
    """A field of config.json, from the top or from the part that describes the language model."""
    text = config.get("text_config")
    return config.get(key, text.get(key) if isinstance(text, dict) else None)


def check_tied(
    record: Record, config: Mapping[str, Any], store: Mapping[str, StoredTensor], findings: Findings
) -> None:
    """Checks tied weights: the tensors that are stored, and what config.json says of tying."""
    for first, second in record.tied:
        findings.check("tied", first not in store, first, f"is stored although it is tied to {second}")
        packed = second.removesuffix(".weight") in record.linears
        findings.check("tied", second in store or packed, second, f"is missing although {first} is tied to it")
    decoder = config.get("decoder")  # of two models in one, whose embeddings and head are the decoder's
    describing = decoder if isinstance(decoder, dict) and isinstance(config.get("encoder"), dict) else config
    tie_flag = config_value(describing, "tie_word_embeddings")
    head = any(first.endswith(".weight") for first, _ in record.tied)
    where = "config.json: tie_word_embeddings"
    findings.check("tied", tie_flag in (None, True, False), where, f"found {tie_flag!r}, expected true or false")
    findings.check("tied", not (head and tie_flag is False), where, "false, and qkit.json ties the output head")
    stored = any(name.endswith("lm_head.weight") for name in store)
    names = config.get("architectures")
    causal = isinstance(names, list) and any(str(name).endswith("ForCausalLM") for name in names)
    what = "the output head is neither stored, nor quantized, nor tied in qkit.json"
    quantized = any(name.endswith("lm_head") for name in record.linears)
    findings.check("tied", stored or head or quantized or not (causal and tie_flag is True), where, what)
    model_type = config.get("model_type")
    same_type = model_type in (None, record.model_type) or names == [record.model_type]
    findings.check(
        "config", same_type, "config.json: model_type", f"{model_type!r}, and qkit.json says '{record.model_type}'"
    )


def check_job(record: Record, decoded: Mapping[str, DecodedLinear], job: Path, findings: Findings) -> None:
    """Compares the decoded weights with the journal of the job: the last committed line about a linear counts."""
    path = job / "journal.jsonl"
    if not path.is_file():
        raise BadCheckpoint(f"{path}: no such journal: use the folder of the job that made the checkpoint")
    intended: dict[str, str] = {}
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline was never committed
        try:
            entry = parse_json(line)
            linears = entry.get("linears", {})
            hashes = {name: linear["weight_sha256"] for name, linear in linears.items()}
        except (ValueError, AttributeError, KeyError, TypeError):
            findings.check("job", False, f"journal.jsonl: line {number}", "is damaged")
            continue
        findings.check(
            "job", all(map(is_hash, hashes.values())), f"journal.jsonl: line {number}", "a hash is malformed"
        )
        intended.update(hashes)
    made = {name for name, linear in record.linears.items() if not linear.kept}  # the others come from the source
    for name in sorted({*intended, *made}):
        in_both = name in intended and name in record.linears
        where = "qkit.json" if name in intended else "journal.jsonl"
        if findings.check("job", in_both, name, f"is in only one of the checkpoint and the job: missing from {where}"):
            decoded_hash = decoded[name].sha256 if name in decoded else None
            fault = "the decoded weight is not the one that the job committed (sha256)"
            findings.check("job", decoded_hash == intended[name], name, fault)
