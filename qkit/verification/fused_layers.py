"""The linears that engines load as one, by their names, and the check that a packed folder treats them alike.

Part of the independent proof of a packed checkpoint (see ``verify.py``); ``engine_fits`` looks at the same groups.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qkit.verification.decode import DecodedLinear
    from qkit.verification.record import Findings, Record

# Linears that engines fuse into one; encoder-decoder attention has another input for k and v than for q.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
_CROSS = re.compile(r"(cross|encoder)_?att(n|ention)")
_EXPERT = re.compile(r"(.+\.experts)\.\d+\.\w+")
_SHARED = ("weight_global_scale", "input_global_scale", "weight_scale", "weight_scale_2", "input_scale")


def fused_groups(names: Iterable[str]) -> list[list[str]]:
    """The groups of linears, by name, that engines load as one: q/k/v, gate/up, w1/w3."""
    known, groups = set(names), []
    for parent in sorted({name.rpartition(".")[0] for name in known}):
        for suffixes in _FUSED:
            group = [f"{parent}.{suffix}" for suffix in suffixes if f"{parent}.{suffix}" in known]
            whole = (
                group if suffixes[0] != "q_proj" else group[2:]
            )  # queries and keys alone may have inputs of their own
            if len(group) > 1 and whole and not _CROSS.search(parent):
                groups.append(group)
    return groups


def expert_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """The linears of each layer of experts, {layer: names}: engines run them as one product."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if expert := _EXPERT.fullmatch(name):
            groups.setdefault(expert[1], []).append(name)
    return groups


def check_fused(record: Record, decoded: Mapping[str, DecodedLinear], findings: Findings, by_name: bool = True) -> None:
    """Checks linears that engines fuse: they need one format, one activation format and one value of each shared scale:
    NVFP4's global scales, the only scale of a tensor, scales of static inputs. Experts of a layer need one format too, and
    all of them to be quantized.

    by_name: engines of language models fuse by the names of linears; diffusers fuses nothing that the record does not list.
    Formats may differ where the recipe asks for it (``engine: any``); ``engine_fits`` says which engines load the result.
    """
    names = {*record.linears, *record.skipped}
    derived = [group for group in fused_groups(names) if not _is_torn(record, group)] if by_name else []
    for group in derived:
        listed = any(set(group) <= set(listed_group) for listed_group in record.fused) or not set(group) & set(
            record.linears
        )
        findings.check("fused", listed, "qkit.json: fused", f"does not list {', '.join(group)} as one group")
    for group in [*record.fused, *derived]:
        where = ", ".join(group)
        unknown = [name for name in group if name not in names]
        findings.check("fused", not unknown, where, f"{', '.join(unknown)} is neither quantized nor skipped")
        members = [record.linears[name] for name in group if name in record.linears]
        is_partial = 0 < len(members) < len(group) - len(unknown)
        findings.check(
            "fused", not is_partial, where, "only some of a fused group are quantized; engines need all or none"
        )
        findings.check("fused", len({m.format for m in members}) <= 1, where, "the weight formats differ")
        findings.check("fused", len({m.activations for m in members}) <= 1, where, "the activation formats differ")
        # What is kept has the scales of the source, whatever they are.
        for scalar in _SHARED if not (members and all(m.kept for m in members)) else ():
            values = {decoded[name].scalars.get(scalar) for name in group if name in decoded}
            fault = f"{scalar} differs within a fused group: {', '.join(map(str, sorted(map(str, values))))}"
            findings.check("fused", len(values) <= 1, where, fault)
    for where, group in expert_groups(names).items() if by_name else ():
        members = [record.linears[name] for name in group if name in record.linears]
        findings.check(
            "fused", len(members) in (0, len(group)), where, "only some linears of its experts are quantized"
        )
        kinds = {(m.format, m.activations) for m in members}
        fault = "the formats of its experts differ, and engines run them as one product"
        findings.check("fused", len(kinds) <= 1 or record.engine == "any", where, fault)


def _is_torn(record: Record, group: list[str]) -> bool:
    """Whether a group has several formats because the recipe lifts the rules of engines."""
    linears = [record.linears.get(name) for name in group]
    return record.engine == "any" and len({x and (x.format, x.activations) for x in linears}) > 1
