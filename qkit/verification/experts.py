"""The check of a result whose source has more routed experts (--prune-experts).

Part of the independent proof (see ``verify.py``). What qkit.json says of the experts has to agree with itself (the lowest
scores were left out), with config.json and with the tensors that are there. With the folder of the source, every expert is
held against the one that it is said to be: rows of routers and biases have to be the source's to the bit, and the beginning
of each decoded matrix has to be nearer to that of its expert in the source than to that of any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qkit.errors import BadCheckpoint
from qkit.verification.decode import FLOATS, Array, DecodedLinear, StoredTensor, read_header
from qkit.verification.record import Fields, Findings, Record, check_fields, is_int, is_text

UNREAD_NOTE = "experts were not compared with the source: {}"
_ITEM = {"F32": 4, "BF16": 2, "F16": 2}


def _is_place(value: Any) -> bool:
    return isinstance(value, dict) and is_text(value.get("module")) and is_int(value.get("dim"))


_FIELDS: Fields = {
    "before": (lambda v: is_int(v, 2), "a number of experts"),
    "left": (lambda v: is_int(v, 1), "a number of experts"),
    "fields": (lambda v: isinstance(v, list) and bool(v) and all(isinstance(p, list) for p in v), "lists of keys"),
    "blocks": (lambda v: isinstance(v, dict) and bool(v), "an object that is not empty"),
    "cut": (lambda v: isinstance(v, dict) and all(map(_is_place, v.values())), "an object of tensor: module and dim"),
}


def check_experts(
    record: Record, config: Mapping[str, Any], store: Mapping[str, StoredTensor], findings: Findings
) -> bool:
    """What the record says of its experts against itself, config.json and the tensors; whether it can be used further."""
    data = record.experts
    if data is None:
        return False
    if not check_fields(data, _FIELDS, "qkit.json: experts", findings):
        return False
    before, left = data["before"], data["left"]
    fewer = findings.check(
        "experts", left < before, "qkit.json: experts.left", f"found {left}, expected below {before}"
    )
    sound = [
        _check_block(f"qkit.json: experts.blocks.{m}", b, before, left, findings) for m, b in data["blocks"].items()
    ]
    for path in data["fields"]:
        value: Any = config
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        where = f"config.json: {'.'.join(map(str, path))}"
        findings.check("experts", value == left, where, f"found {value!r}, expected {left} experts")
    names = [*record.linears, *record.plain]
    for module in data["blocks"]:
        inside = {n.removeprefix(f"{module}.").partition(".")[0] for n in names if n.startswith(f"{module}.")}
        numbers = {int(n) for n in inside if n.isdigit()}
        fault = f"has experts {sorted(numbers)}, expected 0 to {left - 1}"
        findings.check("experts", not numbers or numbers == set(range(left)), module, fault)
    for name, place in data["cut"].items():
        shape = store[name].shape if name in store else ()
        known = place["module"] in data["blocks"] and shape[place["dim"] : place["dim"] + 1] == (left,)
        findings.check("experts", known, name, f"has shape {list(shape)}, expected an entry for each of {left} experts")
    return fewer and all(sound)


def _check_block(where: str, block: Any, before: int, left: int, findings: Findings) -> bool:
    fields: Fields = {
        "kept": (
            lambda v: isinstance(v, list) and len(v) == left and all(is_int(e) and e < before for e in v),
            f"{left} numbers below {before}",
        ),
        "scores": (
            lambda v: isinstance(v, list) and len(v) == before and all(isinstance(s, float) and s >= 0 for s in v),
            f"{before} scores",
        ),
        "tokens": (lambda v: isinstance(v, list) and len(v) == before and all(map(is_int, v)), f"{before} numbers"),
    }
    if not check_fields(block, fields, where, findings):
        return False
    kept, scores = block["kept"], block["scores"]
    rising = findings.check(
        "experts", kept == sorted(set(kept)), f"{where}.kept", f"found {kept}, expected them in order"
    )
    least = min(scores[e] for e in kept)
    better = [e for e in range(before) if e not in kept and scores[e] > least]
    fault = f"expert {better[:1]} was left out, and its score is above {least:g} of one that stays"
    findings.check("experts", not better, f"{where}.kept", fault)
    return rising


# ---- against the source ------------------------------------------------------------------------------------------


def check_source(
    record: Record,
    decoded: Mapping[str, DecodedLinear],
    store: Mapping[str, StoredTensor],
    source: Path,
    findings: Findings,
) -> list[str]:
    """Every expert against the one of the source that it is said to be; gives notes on what could not be compared."""
    if record.transforms:
        return [UNREAD_NOTE.format(f"{', '.join(record.transforms)} changes weights before they are quantized")]
    try:
        stored = {n: t for path in sorted(source.glob("*.safetensors")) for n, t in read_header(path).items()}
    except BadCheckpoint as error:
        return [UNREAD_NOTE.format(error)]
    unread = 0
    for name, place in record.experts["cut"].items():
        original, block = stored.get(name), record.experts["blocks"].get(place["module"])
        if original is None or block is None or name not in store or original.dtype != store[name].dtype:
            unread += 1
            continue
        kept = block["kept"]
        rows = original.array().take(kept, axis=place["dim"]) if max(kept) < _size(original, place["dim"]) else None
        same = rows is not None and np.array_equal(store[name].array(), rows)
        findings.check("experts", same, name, f"its entries are not those of experts {kept} of the source")
    unread += sum(_check_module(record, m, decoded, stored, findings) for m in record.experts["blocks"])
    return [UNREAD_NOTE.format(f"{unread} tensors are stored there in another form")] if unread else []


def _size(stored: StoredTensor, dim: int) -> int:
    return stored.shape[dim] if dim < len(stored.shape) else 0


def _check_module(
    record: Record,
    module: str,
    decoded: Mapping[str, DecodedLinear],
    stored: Mapping[str, StoredTensor],
    findings: Findings,
) -> int:
    """The matrices of the experts of one module; gives how many could not be compared."""
    unread, before, kept = 0, record.experts["before"], record.experts["blocks"][module]["kept"]
    beginnings: dict[str, list[Array] | None] = {}
    for name, linear in record.linears.items():
        number, _, leaf = name.removeprefix(f"{module}.").partition(".")
        if not name.startswith(f"{module}.") or not number.isdigit() or name not in decoded:
            continue
        if leaf not in beginnings:
            beginnings[leaf] = _beginnings(module, leaf, linear.shape, before, stored)
        known, head = beginnings[leaf], decoded[name].head
        if known is None:
            unread += 1
            continue
        distances = [float(np.square(head - x).sum()) for x in known]
        nearest = min(range(before), key=distances.__getitem__)
        expected = kept[int(number)]
        fault = f"is nearest to expert {nearest} of the source, expected {expected}"
        findings.check("experts", distances[expected] <= distances[nearest], name, fault)
    return unread


def _beginnings(
    module: str, leaf: str, shape: tuple[int, int], before: int, stored: Mapping[str, StoredTensor]
) -> list[Array] | None:
    """The beginning of the first row of a matrix, float32, of every expert in the source; None where it is not plain there."""
    apart = [stored.get(f"{module}.{e}.{leaf}.weight") for e in range(before)]
    found = [_part(t, 0, shape[1]) for t in apart if t is not None and t.shape == shape and t.dtype in FLOATS]
    if len(found) == before:
        return found
    whole = stored.get(f"{module}.{leaf}")
    if whole is None or whole.dtype not in FLOATS or whole.shape not in ((before, *shape), (before, *shape[::-1])):
        return None
    size = math.prod(shape)
    if shape[0] == shape[1]:  # which of both ways it lies is not told by its shape
        return None
    if whole.shape[1:] == shape:
        return [_part(whole, e * size, shape[1]) for e in range(before)]
    count = min(shape[1], DecodedLinear.HEAD)
    return [_part(whole, e * size, count * shape[0], whole=True).reshape(count, shape[0])[:, 0] for e in range(before)]


def _part(stored: StoredTensor, first: int, count: int, whole: bool = False) -> Array:
    """Some values of a stored tensor, float32, from a place in it on. whole: all of them, and not only the beginning."""
    item = _ITEM[stored.dtype]
    count = count if whole else min(count, DecodedLinear.HEAD)
    return StoredTensor(stored.path, stored.dtype, (count,), stored.start + first * item, count * item).float32()
