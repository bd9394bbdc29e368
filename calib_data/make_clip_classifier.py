"""Trains the classifier of drawn clips (qkit_data/clip_classifier.py) and writes its weights in bfloat16.

    python calib_data/make_clip_classifier.py [--steps 1500]

Drawn clips, half of them with noise, shifted brightness and a little of another clip, as samples of a model may have. Prints
the share that is right on clips that training did not see.
"""

from __future__ import annotations

import argparse
import math

import torch
from qkit_data.clip_classifier import FILE, ClipClassifier
from qkit_data.clips import TRAINING, clip
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional


def batch(seeds: range) -> tuple[Tensor, Tensor]:
    """(frames [n, F, H, W, 3] from 0 to 1, labels int64 [n, 3])"""
    clips = [clip(s) for s in seeds]
    frames = torch.stack([torch.from_numpy(c.frames) for c in clips]).float() / 255
    return frames, torch.tensor([c.labels for c in clips])


def main() -> None:
    """Train, save, and print the share of right answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=48)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    classifier = ClipClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.01)
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * (0.01 + 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        frames, labels = batch(range(TRAINING + step * args.batch, TRAINING + (step + 1) * args.batch))
        half = args.batch // 2
        strength = torch.rand(half, 1, 1, 1, 1)
        frames[:half] = frames[:half] * (
            1 + 0.2 * (torch.rand(half, 1, 1, 1, 3) - 0.5)
        ) + 0.08 * strength * torch.randn_like(frames[:half])
        frames[:half] = 0.9 * frames[:half] + 0.1 * frames[half : 2 * half]
        loss = torch.stack(
            [functional.cross_entropy(x, labels[:, i]) for i, x in enumerate(classifier(frames)[1])]
        ).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(step, f"{float(loss.detach()):.4f}", flush=True)
    save_file({k: v.to(torch.bfloat16).contiguous() for k, v in classifier.state_dict().items()}, FILE)
    frames, labels = batch(range(1000))
    with torch.inference_mode():
        right = torch.stack([x.argmax(1) for x in classifier.eval()(frames)[1]], 1) == labels
    print("right", right.double().mean(0).tolist(), "all three", float(right.all(1).double().mean()))


if __name__ == "__main__":
    main()
