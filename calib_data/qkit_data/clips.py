"""Short clips of moving shapes with the words that describe them: what tiny-video learns, and is measured by.

A clip is FRAMES pictures of SIZE x SIZE with one shape, or two that hit each other, on a dark ground. The same seed gives the
same clip; seeds from TRAINING on are for training, below for evaluation.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np

SIZE, FRAMES = 32, 9
TRAINING = 1_000_000
SHAPES = ("circle", "square", "triangle")
COLORS = {"red": (230, 60, 50), "green": (60, 190, 80), "blue": (60, 110, 235), "yellow": (235, 205, 60)}
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOTIONS = (*(f"moves {way}" for way in WAYS), "spins", "grows", "shrinks", "turns", "hits")
WORDS = ("a", *SHAPES, *COLORS, "moves", *WAYS, "spins", "grows", "shrinks", "turns", "hits")
GROUND = (24, 26, 30)
_AT = np.arange(SIZE) + 0.5


@dataclass(frozen=True)
class Clip:
    """frames: uint8 [FRAMES, SIZE, SIZE, 3]; prompt: what happens, in WORDS; labels: shape, colour and motion, as indices."""

    frames: Any
    prompt: str
    labels: tuple[int, int, int]


def cover(shape: str, x: float, y: float, radius: float, angle: float) -> Any:
    """float [SIZE, SIZE]: how much of every pixel the shape covers, from its distance to the edge."""
    dx, dy = _AT[None, :] - x, _AT[:, None] - y
    u, v = dx * math.cos(angle) + dy * math.sin(angle), dy * math.cos(angle) - dx * math.sin(angle)
    if shape == "circle":
        inside = radius - np.hypot(u, v)
    elif shape == "square":
        inside = 0.88 * radius - np.maximum(abs(u), abs(v))
    else:
        sides = [u * math.sin(a) - v * math.cos(a) for a in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)]
        inside = 0.62 * radius - np.maximum.reduce(sides)
    return np.clip(inside + 0.5, 0, 1)


def paint(things: list[tuple[str, float, float, float, float, Any]]) -> Any:
    """uint8 [SIZE, SIZE, 3] of (shape, x, y, radius, angle, colour)."""
    picture = np.broadcast_to(np.array(GROUND, dtype=np.float64), (SIZE, SIZE, 3)).copy()
    for shape, x, y, radius, angle, color in things:
        share = cover(shape, x, y, radius, angle)[..., None]
        picture = picture * (1 - share) + share * np.asarray(color, dtype=np.float64)
    return picture.round().astype(np.uint8)


def clip(seed: int, motion: str | None = None) -> Clip:
    """The clip of that seed; motion: one of MOTIONS, else drawn too."""
    r = random.Random(seed)
    motion = motion or r.choice(MOTIONS)
    shape = r.choice(SHAPES[1:] if motion == "spins" else SHAPES)
    name = r.choice(list(COLORS))
    color, middle = np.array(COLORS[name], dtype=np.float64), SIZE / 2
    x, y, radius = middle + r.uniform(-4, 4), middle + r.uniform(-4, 4), r.uniform(5, 7.5)
    angle, far = 0.0 if motion != "spins" else r.uniform(0, math.pi / 2), r.uniform(6, 9)
    other = r.choice([c for c in COLORS if c != name])
    turn = r.choice((-1, 1)) * r.uniform(1.2, 2.2)
    frames = []
    for i in range(FRAMES):
        t = i / (FRAMES - 1)
        if motion.startswith("moves"):
            way = WAYS[motion.split()[1]]
            things = [(shape, x + way[0] * far * (2 * t - 1), y + way[1] * far * (2 * t - 1), radius, 0.0, color)]
        elif motion == "spins":
            things = [(shape, x, y, radius, angle + turn * t, color)]
        elif motion in ("grows", "shrinks"):
            share = t if motion == "grows" else 1 - t
            things = [(shape, x, y, 3 + 7 * share, 0.0, color)]
        elif motion == "turns":
            things = [(shape, x, y, radius, 0.0, color * (1 - t) + t * np.array(COLORS[other], dtype=np.float64))]
        else:  # two of them meet in the middle and go back
            gap = 4.5 + 8 * abs(2 * t - 1)
            things = [
                (shape, middle - gap, y, 4.5, 0.0, color), ("circle", middle + gap, y, 4.5, 0.0, COLORS[other]),
            ]  # fmt: skip
        frames.append(paint(things))
    said = f"a {name} {shape} {motion}" + {"turns": f" {other}", "hits": f" a {other} circle"}.get(motion, "")
    labels = SHAPES.index(shape), list(COLORS).index(name), MOTIONS.index(motion)
    return Clip(np.stack(frames), said, labels)
