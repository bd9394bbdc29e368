"""A Llama checkpoint with strong outliers and the same function, made from one that has none.

    python reports/outliers/make_model.py --model DIR --out DIR [--seed 0]

Every factor is a power of two, so no weight is rounded; only the order of sums over MLP channels changes.

 1. Loud channels: some gains of every RMSNorm are multiplied by 2^k and the columns of the linears that follow divided
    by it (the same channels in all blocks, and a few of each norm's own); value rows against columns of o_proj, up_proj
    rows against columns of down_proj likewise. These channels fill the range of an activation, and their columns vanish
    beside the other weights of their groups.
 2. Quiet channels, the reverse: the gain is divided and the columns multiplied: a large weight in every row.
 3. Isolated large weights: the MLP is widened by pairs of channels with the same gate row, opposite up rows, and the
    same few large weights in down_proj, all others zero: h c - h c = 0. The pairs lie among the ordinary channels, so
    that a large weight takes the range of a group that holds ordinary weights of its row.

What a method can see of it. RTN: nothing, its search may only clip. GPTQ: the errors, after the scales are chosen:
it absorbs some in other columns. SmoothQuant and AWQ: 1 to 3, from the size of an input (and, SmoothQuant only, of its
weights), by one exponent for all channels of a linear; SmoothQuant's rule cancels a rescaling exactly, at any exponent.
Rotation: 1 and 2 at the norms (it folds the gains) and 3 (it mixes the rows of down_proj: a large weight becomes a
smaller one in every row); not the inputs of down_proj, and those of o_proj only within a head. Taking out single
weights, as ReQuant does: 3 (0.06 % of the weights of tiny-llama's blocks) and 2 (0.26 %), as far as its budget goes.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LOUD, OWN, QUIET = 64, 128, 256  # one channel in so many is loud in all blocks, loud in one norm, quiet in one norm
NORM, VALUE, UP, DIM = 6, 3, 3, 4  # exponents of 2: loud gains, value rows and up_proj rows, and quiet gains
WIDER = 6  # the MLP grows by one channel in so many, in pairs
SPIKED, SPIKE = 64, 16  # a pair gives one row of down_proj in so many a weight so many times the row's largest
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def draw(n: int, one_in: int, generator: torch.Generator) -> Tensor:
    """One index in ``one_in`` of n, at least one."""
    return torch.randperm(n, generator=generator)[: max(1, n // one_in)]


def rescale_norms(block: dict[str, Tensor], loud: Tensor, generator: torch.Generator) -> None:
    """Loud and quiet channels behind both norms."""
    for norm, readers in READERS.items():
        gain = block[norm]
        factor = torch.ones_like(gain)
        factor[draw(len(gain), QUIET, generator)] = 2.0**-DIM
        factor[draw(len(gain), OWN, generator)] = 2.0**NORM
        factor[loud] = 2.0**NORM
        block[norm] = gain * factor
        for name in readers:
            block[name] = block[name] / factor


def rescale_values(block: dict[str, Tensor], head: int, generator: torch.Generator) -> None:
    """A loud channel in every value head; query heads of a group read the same one."""
    value, output = block["self_attn.v_proj"], block["self_attn.o_proj"]
    heads = len(value) // head
    factor = torch.ones(heads, 1, head, dtype=value.dtype)
    factor[torch.arange(heads), 0, torch.randint(head, (heads,), generator=generator)] = 2.0**VALUE
    block["self_attn.v_proj"] = value * factor.reshape(-1, 1)
    seen = factor.expand(heads, output.shape[1] // len(value), head).reshape(-1)
    block["self_attn.o_proj"] = output / seen


def rescale_mlp(block: dict[str, Tensor], generator: torch.Generator) -> None:
    """Loud channels between up_proj and down_proj."""
    factor = torch.ones(len(block["mlp.up_proj"]), dtype=block["mlp.up_proj"].dtype)
    factor[draw(len(factor), 2 * OWN, generator)] = 2.0**UP
    block["mlp.up_proj"] = block["mlp.up_proj"] * factor[:, None]
    block["mlp.down_proj"] = block["mlp.down_proj"] / factor


def widen_mlp(block: dict[str, Tensor], generator: torch.Generator) -> None:
    """Pairs of channels that cancel, with large weights in down_proj, spread evenly among the ordinary channels."""
    gate, up, down = (block[f"mlp.{x}_proj"] for x in ("gate", "up", "down"))
    pairs = len(up) // (2 * WIDER)
    copied = torch.randperm(len(up), generator=generator)[:pairs]
    quiet = up[copied] / 2.0**DIM
    spikes = torch.zeros(len(down), pairs, dtype=down.dtype)
    for column in spikes.T:
        rows = draw(len(down), SPIKED, generator)
        sign = torch.randint(2, (len(rows),), generator=generator) * 2 - 1
        column[rows] = down[rows].abs().amax(1) * SPIKE * sign
    places = torch.arange(len(up)).tensor_split(pairs)
    order = [torch.cat([c, torch.tensor([len(up) + i, len(up) + pairs + i])]) for i, c in enumerate(places)]
    index = torch.cat(order)
    block["mlp.gate_proj"] = torch.cat([gate, gate[copied], gate[copied]])[index]
    block["mlp.up_proj"] = torch.cat([up, quiet, -quiet])[index]
    block["mlp.down_proj"] = torch.cat([down, spikes, spikes], 1)[:, index]


def make(model: Path, out: Path, seed: int = 0) -> None:
    """Write the checkpoint ``out`` with the function of the Llama checkpoint ``model``."""
    config = json.loads((model / "config.json").read_text())
    if config["model_type"] != "llama" or config.get("mlp_bias") or config.get("attention_bias"):
        raise SystemExit(f"{model}: not a Llama without biases")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(model.glob("*.safetensors")):
        tensors.update(load_file(shard))
    generator = torch.Generator().manual_seed(seed)
    loud = draw(config["hidden_size"], LOUD, generator)
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        names = [n for n in tensors if n.startswith(prefix)]
        block = {n.removeprefix(prefix).removesuffix(".weight"): tensors[n] for n in names}
        rescale_norms(block, loud, generator)
        rescale_values(block, head, generator)
        rescale_mlp(block, generator)
        widen_mlp(block, generator)
        tensors.update({f"{prefix}{n}.weight": t.contiguous() for n, t in block.items()})
    config["intermediate_size"] = len(tensors["model.layers.0.mlp.up_proj.weight"])
    out.mkdir(parents=True)
    for file in model.iterdir():
        if file.suffix not in (".safetensors", ".md") and not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def statistics(model: Any, ids: Tensor) -> tuple[Tensor, dict[str, tuple[float, float]]]:
    """Logits, and by kind of linear max / median of |input| and of |weight|, the largest of all blocks."""
    found: dict[str, tuple[float, float]] = {}

    def peak(t: Tensor) -> float:
        magnitude = t.detach().float().abs()
        return float(magnitude.max() / magnitude[magnitude > 0].median())

    def note(kind: str, linear: Any, x: Tensor) -> None:
        was = found.get(kind, (0.0, 0.0))
        found[kind] = (max(was[0], peak(x)), max(was[1], peak(linear.weight)))

    linears = [(n.rpartition(".")[2], m) for n, m in model.named_modules() if n.endswith("_proj")]
    handles = [m.register_forward_pre_hook(lambda m, args, kind=kind: note(kind, m, args[0])) for kind, m in linears]
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
    for handle in handles:
        handle.remove()
    return logits, found


def main() -> None:
    """Make the model and compare it with the original."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="must not exist")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make(args.model, args.out, args.seed)
    from qkit.calibration.dataset import read_text
    from qkit.runtime.loading import load, load_tokenizer
    from qkit.workflows.calibration_rows import embedded_text

    text = read_text(embedded_text())[:8000]
    ids = torch.tensor([load_tokenizer(args.model)(text, add_special_tokens=False, verbose=False)["input_ids"][:512]])
    before, plain = statistics(load(args.model, dtype=torch.float32), ids)
    after, made = statistics(load(args.out, dtype=torch.float32), ids)
    print(
        f"largest logit difference {float((after - before).abs().max()):.1e}, largest logit {float(before.max()):.1f}"
    )
    print(f"{'max / median':<14}{'|input|':>10}{'made':>10}{'|weight|':>10}{'made':>10}")
    for kind, (x, w) in plain.items():
        print(f"{kind:<14}{x:>10.0f}{made[kind][0]:>10.0f}{w:>10.0f}{made[kind][1]:>10.0f}")


if __name__ == "__main__":
    main()
