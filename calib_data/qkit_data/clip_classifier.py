"""The classifier of drawn clips: it tells shape, colour and motion, and so measures samples of tiny-video.

A small convolutional network that ``calib_data/make_clip_classifier.py`` trains on drawn clips; its weights lie beside this
file.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qkit_data.clips import COLORS, FRAMES, MOTIONS, SHAPES, SIZE

FILE = Path(__file__).with_name("clip_classifier.safetensors")
FEATURES = 64


class ClipClassifier(nn.Module):
    """A classifier of clips: float32 [n, FRAMES, SIZE, SIZE, 3] from 0 to 1, to features [n, FEATURES] and three sets of
    logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(3, 12, 3, padding=1), nn.GELU(),
            nn.Conv3d(12, 24, 3, stride=(1, 2, 2), padding=1), nn.GELU(),
            nn.Conv3d(24, 32, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv3d(32, 32, 3, stride=2, padding=1), nn.GELU(),
            nn.Flatten(), nn.Linear(32 * 3 * (SIZE // 8) ** 2, FEATURES), nn.GELU(),
        )  # fmt: skip
        self.heads = nn.ModuleList(nn.Linear(FEATURES, n) for n in (len(SHAPES), len(COLORS), len(MOTIONS)))

    def forward(self, frames: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(features, [logits of shapes, of colours, of motions])"""
        features = self.body(2 * frames.permute(0, 4, 1, 2, 3) - 1)
        return features, [head(features) for head in self.heads]


def load_classifier() -> ClipClassifier:
    """The trained classifier, in eval mode."""
    classifier = ClipClassifier()
    classifier.load_state_dict({k: v.float() for k, v in load_file(FILE).items()})
    return classifier.eval().requires_grad_(False)


def fits(frames: Tensor) -> bool:
    """Whether clips [n, ...] of that shape can be classified."""
    return tuple(frames.shape[1:]) == (FRAMES, SIZE, SIZE, 3)


def labels_of(prompt: str) -> tuple[int, int, int] | None:
    """Shape, colour and motion of a prompt of ``clips``; None of any other."""
    words = prompt.split()
    motion = next((m for m in MOTIONS if f" {m}" in prompt), None)
    if len(words) < 4 or words[1] not in COLORS or words[2] not in SHAPES or motion is None:
        return None
    return SHAPES.index(words[2]), list(COLORS).index(words[1]), MOTIONS.index(motion)


def recognised(classifier: ClipClassifier, frames: Tensor, labels: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
    """(features float32 [n, FEATURES], bool [n, 3]: shape, colour and motion are those that were asked for)."""
    with torch.inference_mode():
        features, logits = classifier(frames)
    predicted = torch.stack([x.argmax(1) for x in logits], 1)
    return features, predicted == torch.tensor(labels)
