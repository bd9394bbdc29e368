"""Makes qkit/verification/vllm_table.json: what vLLM's own code selects for each format, kind of GPU and alignment of a layer.

python tools/vllm_table.py --python VENV/bin/python --base MODEL --work DIR [--only modelopt]

--python: an interpreter with vLLM (a build for CPUs does, best with humming-kernels beside it); --base: the folder of a model
with experts, whose config.json is all that is read. What is selected for "cpu" is that for CPUs without AMX. Answers
of each kind of GPU go to DIR first, so that a stopped run goes on. --only: ask again only of combinations with this in their
names, and leave all others as they are.

Every question is one layer [N, K] that vLLM makes without values. What kernels ask of shapes is which powers of two divide
them, so N and K are odd multiples of powers of two, and one rule stands for all shapes of one answer: {"n": 128, "k": 64} is
about every N that 128 divides and every K that 64 divides, as far as no rule before it is.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

from qkit.engines.selector import LayerChoice, SelectorAnswer, ask
from qkit.tensor.compressed_tensors import config
from qkit.tensor.formats import ACTIVATION_FORMATS, FORMATS, SCHEMES, Format, layout
from qkit.tensor.layouts import modelopt
from qkit.verification.engine_types import PLATFORMS
from qkit.verification.vllm_table import GROUPS, TABLE, format_key

POWERS = (1, 4, 8, 16, 32, 64, 128, 256)
EXPERT_POWERS = (1, 16, 32, 64, 128, 256)
ODD_N, ODD_K = 129, 131  # above all least sizes
SMALL = 128  # some kernels ask for at least so many rows and columns
OTHER_GROUPS = (96, 24, 80, 120, 512)  # the first stands for all; the others are asked once
ALIGNED = (256, 256)
WHOLE_ROW = 512  # a group that is as long as the rows of what is asked
MODELOPT = "modelopt"
Pair = tuple[Format, Format | None, str]
Cell = tuple[int, int]


def pairs() -> dict[str, Pair]:
    """Every combination of formats that is asked, by its key in the table."""
    found = [(s.weights, s.activations, "") for s in SCHEMES.values()]
    found += [(FORMATS["int4_asym"], ACTIVATION_FORMATS["int8_token"], "")]
    found += [(FORMATS[name], None, "") for name in ("fp8", "fp8_channel", "fp8_block")]
    found += [(*modelopt.pair_of(name), MODELOPT) for name in modelopt.ALGORITHMS]
    found += [(FORMATS[name], ACTIVATION_FORMATS["int8_token"], "int-quantized") for name in ("int4", "int4_channel")]
    every: dict[str, Pair] = {}
    for weights, activations, packing in found:
        groups = (
            (*GROUPS, OTHER_GROUPS[0], WHOLE_ROW, -1)
            if weights.regroups and weights.kind == "int" and not packing
            else (None,)
        )
        for group in groups:
            fitted = weights if group is None else weights.with_group(group)
            every[key_of((fitted, activations, packing))] = (fitted, activations, packing)
    return every


def key_of(pair: Pair) -> str:
    """The key of a combination in the table."""
    weights, activations, packing = pair
    columns = WHOLE_ROW if weights.kind == "int" else None
    return format_key(weights, activations, packing or layout(weights, activations), columns)


def question(pair: Pair, kind: str, n: int, k: int, dtype: str) -> dict[str, object]:
    """One layer, as the selector's script reads it."""
    weights, activations, packing = pair
    if packing == MODELOPT:
        named = "layer.experts" if kind == "experts" else "layer"
        quantization = modelopt.config({named: (weights, activations)}, [], [], cache=False)
        return {"quantization": quantization, "kind": kind, "in": k, "out": [n], "dtype": dtype}
    quantization = config({"layer": (weights, activations)}, [], {})
    if packing:
        quantization["format"] = packing
        for group in quantization["config_groups"].values():
            group["format"] = packing
    return {"quantization": quantization, "kind": kind, "in": k, "out": [n], "dtype": dtype}


def cells(pair: Pair, kind: str) -> Iterator[tuple[Cell, int, int]]:
    """(powers of two, N, K) of every question about a combination."""
    group = pair[0].group or 1
    if group == WHOLE_ROW:
        yield from (((n, 1), n * ODD_N, WHOLE_ROW) for n in POWERS if kind == "column")
        yield from (((n, 1), n * ODD_N, WHOLE_ROW) for n in (WHOLE_ROW,) if kind == "experts")
        return
    for n in POWERS if kind == "column" else EXPERT_POWERS:
        for k in POWERS if kind == "column" else EXPERT_POWERS:
            if k % (group & -group) == 0 and (kind == "column" or n % (group & -group) == 0):
                odd = group // (group & -group)
                yield (n, k), n * ODD_N * (odd if kind == "experts" else 1), k * ODD_K * odd


def answer_text(choice: LayerChoice) -> str:
    """'Scheme: kernel', or '!' and why it is refused."""
    if choice.refused:
        words = " ".join(choice.refused.split(" Reasons")[0].split())
        return "!" + words[:160]
    return f"{choice.scheme}: {choice.kernel}" if choice.kernel else choice.scheme


def dtype_on(gpu: str, dtype: str) -> str:
    """What vLLM computes in: GPUs before sm80 have no bfloat16."""
    return "float16" if gpu == "sm75" else dtype


def ask_gpu(gpu: str, python: Path, base: Path, only: str) -> dict[str, object]:
    """The version, and {kind/dtype: {format: {cell: answer}}} of one kind of GPU. float16 has entries where its answer for a
    layer that all powers divide is another."""
    every = {key: pair for key, pair in pairs().items() if only in key}
    first = [(kind, dtype, key) for kind in ("column", "experts") for dtype in ("bfloat16", "float16") for key in every]
    found, whole = asked(
        gpu, python, base, [(kind, dtype, key, ALIGNED, *aligned(every[key])) for kind, dtype, key in first]
    )
    rest = []
    for kind, dtype, key in first:
        if dtype == "float16" and found[kind, dtype, key, ALIGNED] == found[kind, "bfloat16", key, ALIGNED]:
            continue
        if found[kind, dtype, key, ALIGNED].startswith("!"):  # no shape is better
            rest.append((kind, dtype, key, ALIGNED, *aligned(every[key])))
            continue
        rest += [(kind, dtype, key, cell, n, k) for cell, n, k in cells(every[key], kind)]
        rest += [(kind, f"{dtype}/small", key, cell, n, k) for cell, n, k in small_cells(every[key], kind)]
    full, _ = asked(gpu, python, base, rest)
    result: dict[str, dict[str, dict[str, str]]] = {}
    for (kind, dtype, key, cell), answer in full.items():
        result.setdefault(f"{kind}/{dtype}", {}).setdefault(key, {})["x".join(map(str, cell))] = answer
    return {"version": whole.version, "architectures": whole.architectures, "answers": result}


def aligned(pair: Pair) -> tuple[int, int]:
    """N and K that every power divides, and the group."""
    if pair[0].group == WHOLE_ROW:
        return 256 * ODD_N, WHOLE_ROW
    odd = (pair[0].group or 1) // ((pair[0].group or 1) & -(pair[0].group or 1))
    size = max(256, (pair[0].group or 1) & -(pair[0].group or 1))
    return size * 16 * odd, size * 16 * odd


def small_cells(pair: Pair, kind: str) -> Iterator[tuple[Cell, int, int]]:
    """As ``cells``, of layers with fewer than SMALL rows or columns; integers have kernels without such a limit."""
    if pair[0].kind == "int" or kind == "experts":
        return
    group = pair[0].group or 1
    for n in (1, 4, 8):
        if n % group == 0:
            yield from (((n, k), 3 * n, k * ODD_K) for k in (128, 256))
    for n in (16, 32, 64):
        yield from (((n, k), n, k * ODD_K) for k in (128, 256))
        if n % group == 0:
            yield (256, n), 256 * ODD_N, n
            yield (n, n), n, n


def asked(gpu: str, python: Path, base: Path, questions: list) -> tuple[dict, SelectorAnswer]:
    """{(kind, dtype, format, cell): answer}, and all of it"""
    every = pairs()
    layers = [
        question(every[key], kind, n, k, dtype_on(gpu, dtype.removesuffix("/small")))
        for kind, dtype, key, _, n, k in questions
    ]
    answer = ask(python, gpu, {}, layers=layers, base=base, amx=False)
    print(gpu, len(layers), "layers, vLLM", answer.version, "stand-ins:", *answer.stand_ins, flush=True)
    names = [(kind, dtype, key, cell) for kind, dtype, key, cell, _, _ in questions]
    return dict(zip(names, map(answer_text, answer.layers), strict=True)), answer


def in_general(answer: str) -> str:
    """A refusal without the sizes of the layer that was asked."""
    if not answer.startswith("!"):
        return answer
    words = re.sub(r"\d+", lambda found: found[0] if int(found[0]) <= 128 or found[0] == "256" else "...", answer)
    return f"{words} (it says no more)" if words.endswith(":") else words


def rules_of(answers: dict[Cell, str]) -> list[list[object]]:
    """[n, k, answer] in order: the first whose n divides N and whose k divides K holds."""
    left, rules = dict(answers), []
    while left:
        best: tuple[int, Cell, str] | None = None
        for n, k in left:
            inside = {cell: a for cell, a in left.items() if cell[0] % n == 0 and cell[1] % k == 0}
            if len(set(inside.values())) == 1 and (best is None or len(inside) > best[0]):
                best = (len(inside), (n, k), inside[n, k])
        assert best is not None
        _, (n, k), answer = best
        rules.append([n, k, answer])
        left = {cell: a for cell, a in left.items() if cell[0] % n or cell[1] % k}
    last = rules[-1]
    rules[-1] = [1, 1, last[2]]  # cells below cannot be: a group divides every K
    return rules


def table_of(raw: dict[str, dict], before: dict) -> dict[str, object]:
    """The table of all answers, and of what is in the table ``before``. Rules that are the same are stored once."""
    rules = [json.dumps(r) for r in before.get("rules", ())]
    rows: dict[str, dict[str, dict[str, int]]] = before.get("rows", {})
    for gpu, found in raw.items():
        for part, formats in found["answers"].items():
            for key, by_cell in formats.items():
                answers = {(int(n), int(k)): in_general(a) for c, a in by_cell.items() for n, k in [c.split("x")]}
                text = json.dumps(rules_of(answers))
                if text not in rules:
                    rules.append(text)
                rows.setdefault(part, {}).setdefault(key, {})[gpu] = rules.index(text)
    versions = {found["version"] for found in raw.values()} | ({before["version"]} if before else set())
    assert len(versions) == 1, versions
    classes = sorted({name for found in raw.values() for name in found["architectures"]})
    return {
        "engine": "vLLM",
        "version": versions.pop(),
        "architectures": classes,
        "rules": [json.loads(r) for r in rules],
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--python", "--base", "--work"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    raw = {}
    for gpu in PLATFORMS:
        file = options.work / f"{gpu}.json"
        if not file.is_file():
            answers = ask_gpu(gpu, options.python, options.base, options.only)
            file.write_text(json.dumps(answers))
        raw[gpu] = json.loads(file.read_text())
    before = json.loads(TABLE.read_text()) if options.only else {}
    TABLE.write_text(json.dumps(table_of(raw, before), indent=None, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
