"""Leaving experts out against narrower weights at equal bytes: perplexity of packed checkpoints, reloaded from disk.

    python reports/experts/train.py --tokenizer DIR --text train.txt.xz --out MODEL
    python reports/experts/run.py --model MODEL --text heldout.txt --name tiny-moe

Every row is a command that a user types, with GPTQ and the embedded data (64 x 256 tokens). W3 with all experts stands beside W4
without a quarter of them: both files have nearly the same bytes. Beside REAP's choice, which is what ``--prune-experts`` does,
stand others, made by hand with transformers before qkit quantizes the rest:

    frequency   the experts that the fewest tokens are sent to are left out
    merge       as REAP, and each expert that does not stay is merged into the one of the others whose outputs are most like its
                own, each weighed by its tokens (the weights are averaged; the router keeps the rows of those that stay)
    search      a simplified EEP (arXiv 2407.00945, its first phase): from REAP's choice on, single experts are exchanged in one
                block at a time, and an exchange stays where the loss on the calibration rows falls (the whole model is in memory)

The text in windows of 512 tokens, float32 arithmetic on the packed weights. Writes reports/experts/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

import qkit
from qkit.calibration.dataset import read_text
from qkit.evaluation.metrics import nll_windows
from qkit.planning.request import Request
from qkit.runtime.loading import load, load_tokenizer
from qkit.workflows.calibration_rows import calibration_of
from qkit.workflows.quantize import open_structure

WINDOW, EXCHANGES, SEARCH_ROWS, SAMPLES = 512, 80, 8, 64
Choice = dict[int, list[int]]  # {block: the experts that stay}
Mix = dict[int, Tensor]  # {block: [experts that stay, experts], what of each goes into those that stay}


def outputs_of(model: Any, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """For each block, the tokens of each expert [experts], and how alike their outputs are [experts, experts] (cosine)."""
    counts, alike, handles = {}, {}, []
    for i, block in enumerate(model.model.layers):
        experts = block.mlp.experts

        def look(module: Any, args: tuple[Tensor, ...], i: int = i) -> None:
            hidden, index, _ = args
            total = torch.bincount(index.flatten(), minlength=module.num_experts).float()
            counts[i] = counts.get(i, 0) + total
            x = hidden[:256]
            gate, up = torch.einsum("th,eoh->eto", x, module.gate_up_proj).chunk(2, -1)
            out = torch.einsum("eti,ehi->eth", functional.silu(gate) * up, module.down_proj).flatten(1)
            out = functional.normalize(out, dim=-1)
            alike[i] = alike.get(i, 0) + out @ out.T

        handles.append(experts.register_forward_pre_hook(look))
    with torch.inference_mode():
        for rows in tokens.split(8):
            model(input_ids=rows)
    for handle in handles:
        handle.remove()
    order = range(len(model.model.layers))
    return [counts[i] for i in order], [alike[i] for i in order]


def loss_with(model: Any, kept: Choice, rows: Tensor) -> float:
    """The loss where tokens choose among the experts that stay."""
    handles = []
    for i, block in enumerate(model.model.layers):
        lost = torch.ones(block.mlp.gate.weight.shape[0], dtype=torch.bool)
        lost[kept[i]] = False

        def route(module: Any, args: tuple[Tensor, ...], out: Any, lost: Tensor = lost) -> Any:
            logits = functional.linear(args[0].reshape(-1, args[0].shape[-1]), module.weight)
            weights, index = logits.masked_fill(lost, -torch.inf).softmax(-1).topk(module.top_k, dim=-1)
            return logits, (weights / weights.sum(-1, keepdim=True)).to(logits.dtype), index

        handles.append(block.mlp.gate.register_forward_hook(route))
    try:
        with torch.inference_mode():
            return sum(float(model(input_ids=r, labels=r).loss) * len(r) for r in rows.split(8)) / len(rows)
    finally:
        for handle in handles:
            handle.remove()


def searched(model: Any, start: Choice, rows: Tensor) -> Choice:
    """The choice after exchanges of single experts that lower the loss."""
    chance, kept = torch.Generator().manual_seed(0), {i: list(k) for i, k in start.items()}
    best = loss_with(model, kept, rows)
    count = model.config.num_experts
    for _ in range(EXCHANGES):
        block = int(torch.randint(len(kept), (), generator=chance))
        lost = [e for e in range(count) if e not in kept[block]]
        new = lost[int(torch.randint(len(lost), (), generator=chance))]
        old = kept[block][int(torch.randint(len(kept[block]), (), generator=chance))]
        tried = {**kept, block: sorted({*kept[block], new} - {old})}
        loss = loss_with(model, tried, rows)
        if loss < best:
            kept, best = tried, loss
    return kept


def save_smaller(model: Any, kept: Choice, folder: Path, source: Path, mix: Mix | None = None) -> None:
    """The model with the experts that stay, or mixtures of experts in their places."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.num_experts = len(kept[0])
    smaller = type(model)(config)
    values = model.state_dict()
    for name, value in smaller.state_dict().items():
        if value.shape == values[name].shape:
            continue
        block = int(name.split("layers.")[1].split(".")[0])
        mixed = mix is not None and "experts" in name
        values[name] = torch.einsum("ke,eij->kij", mix[block], values[name]) if mixed else values[name][kept[block]]
    smaller.load_state_dict(values)
    smaller.to(torch.bfloat16).save_pretrained(folder)
    for file in source.glob("*token*"):
        shutil.copyfile(file, folder / file.name)


def merged_into(kept: Choice, counts: list[Tensor], alike: list[Tensor]) -> Mix:
    """What goes into each expert that stays: itself and those most like it, by their tokens."""
    result: Mix = {}
    for block, stay in kept.items():
        mix = torch.zeros(len(stay), len(counts[block]))
        for e, count in enumerate(counts[block].tolist()):
            place = stay.index(e) if e in stay else int(alike[block][e, stay].argmax())
            mix[place, e] = max(count, 1.0)
        result[block] = mix / mix.sum(1, keepdim=True)
    return result


def main() -> None:
    """Measure all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--name", required=True)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    tokens = torch.tensor(tokenizer(read_text(args.text), add_special_tokens=False, verbose=False)["input_ids"])
    path = Path(__file__).parent / f"{args.name}.json"
    result: dict[str, Any] = {"model": args.name, "text": args.text.name, "windows": args.windows, "rows": []}

    base: dict[str, Tensor] = {}

    def windows(folder: Path) -> Tensor:
        with torch.inference_mode():
            return nll_windows(load(str(folder), dtype=torch.float32), tokens, WINDOW, args.windows)

    def add(experts: str, scheme: str, model: Path, **options: Any) -> dict[str, Any]:
        began = time.monotonic()
        if scheme == "bf16":
            out = model
        else:
            out = work / f"{experts}-{scheme}"
            qkit.quantize(model=model, out=out, scheme=scheme, method="gptq", samples=SAMPLES, **options)
        row = {"experts": experts, "scheme": scheme, "seconds": round(time.monotonic() - began, 1)}
        row["bytes"] = sum(f.stat().st_size for f in out.glob("*.safetensors"))
        losses = windows(out).mean(1)  # of each window
        row["perplexity"] = float(losses.mean().exp())
        if row["experts"] == "REAP" and scheme == "w4a16":
            base["REAP"] = losses
        if "REAP" in base and scheme == "w4a16":
            difference = losses - base["REAP"]
            half = 1.96 * float(difference.std()) / len(difference) ** 0.5
            mean = float(difference.mean())
            row["beyond_reap"] = [mean, mean - half, mean + half]  # nats a token, with the 95 % interval over windows
        result["rows"].append(row)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(row), flush=True)
        return json.loads((out / "qkit.json").read_text()) if scheme != "bf16" else {}

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        result["reference"] = float(windows(args.model).mean().exp())
        for scheme in ("w4a16", "w3a16"):
            add("all", scheme, args.model)
        record = add("REAP", "w4a16", args.model, prune_experts=0.25)
        kept = {i: b["kept"] for i, b in enumerate(record["experts"]["blocks"].values())}
        result["tokens"] = [b["tokens"] for b in record["experts"]["blocks"].values()]
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        rows = calibration_of(Request(model=str(args.model), samples=SAMPLES), open_structure(str(args.model))).tokens
        counts, alike = outputs_of(model, rows)
        left = len(kept[0])
        often = {i: sorted(c.sort(descending=True, stable=True).indices[:left].tolist()) for i, c in enumerate(counts)}

        def by_hand(name: str, choice: Choice, mix: Mix | None = None) -> None:
            smaller = work / name
            save_smaller(model, choice, smaller, args.model, mix)
            add(name, "bf16", smaller)
            if name != "REAP":
                add(name, "w4a16", smaller)

        by_hand("REAP", kept)
        by_hand("frequency", often)
        by_hand("merge", kept, merged_into(kept, counts, alike))
        began = time.monotonic()
        found = searched(model, kept, rows[:: len(rows) // SEARCH_ROWS][:SEARCH_ROWS])
        result["search_seconds"] = round(time.monotonic() - began, 1)
        by_hand("search", found)


if __name__ == "__main__":
    main()
