"""Pictures with questions and answers, drawn from a seed: for calibration, training and evaluation with no data set at hand.

``scene(seed)`` is the same picture and the same questions for the same seed, on every machine: drawing uses numpy and a
font of its own. There are three kinds of pictures, 48 x 48 pixels: objects on a grid (2 to 5 of them; shape, colour, place,
number, relations), signs (a word of three letters) and bar charts. Seeds from 0 are for evaluation, from CALIBRATION for
calibration, from TRAINING for training: no two of them overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE = 48
CALIBRATION, TRAINING = 1_000_000, 2_000_000
KINDS = ("color", "shape", "count", "position", "relation", "text", "chart")

COLORS = {
    "red": (220, 40, 40), "green": (40, 180, 60), "blue": (60, 90, 235), "yellow": (235, 215, 50),
    "white": (240, 240, 240), "purple": (165, 60, 200),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
WORDS = (
    "BED BOX BUS CAR CAT COW CUP DOG EAR EGG FOX HAT HEN ICE KEY LEG MAN MAP NET OAK OIL PEN PIG RAT SEA SKY SUN TEA TOY "
    "WAX WIG YAK"
).split()
_FONT = {  # seven rows of five bits
    "A": "0E11111F111111", "B": "1E11111E11111E", "C": "0E11101010110E", "D": "1E11111111111E", "E": "1F10101E10101F",
    "F": "1F10101E101010", "G": "0E11101711110E", "H": "1111111F111111", "I": "0E04040404040E", "K": "11121418141211",
    "L": "1010101010101F", "M": "111B1515111111", "N": "11191513111111", "O": "0E11111111110E", "P": "1E11111E101010",
    "R": "1E11111E141211", "S": "0F10100E01011E", "T": "1F040404040404", "U": "1111111111110E", "W": "111111151B1B11",
    "X": "11110A040A1111", "Y": "11110A04040404",
}  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """A question, its one-word or two-word answer, and of KINDS what it asks about."""

    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Scene:
    """image: uint8 [48, 48, 3]"""

    image: NDArray[np.uint8]
    turns: tuple[Turn, ...]


def scene(seed: int, turns: int = 4) -> Scene:
    """The picture of that seed and at most so many questions about it, no two alike."""
    chance = np.random.default_rng(seed)
    canvas = np.full((SIZE, SIZE, 3), chance.integers(15, 70), dtype=np.float64)
    draw: Callable[[np.random.Generator, NDArray[np.float64]], list[Turn]]
    draw = (_objects, _objects, _objects, _sign, _chart)[chance.integers(5)]
    asked = draw(chance, canvas)
    order = chance.permutation(len(asked))
    canvas += chance.normal(0, 5, canvas.shape)
    return Scene(canvas.round().clip(0, 255).astype(np.uint8), tuple(asked[i] for i in order[:turns]))


def _objects(chance: np.random.Generator, canvas: NDArray[np.float64]) -> list[Turn]:
    count = int(chance.integers(2, 6))
    cells = chance.choice(9, count, replace=False).tolist()
    names = [(str(chance.choice(list(COLORS))), str(chance.choice(SHAPES))) for _ in cells]
    for cell, (color, shape) in zip(cells, names, strict=True):
        _draw(chance, canvas, cell, color, shape)
    turns = [Turn("How many objects are there?", str(count), "count")]
    colors, shapes = [c for c, _ in names], [s for _, s in names]
    for color in dict.fromkeys((*colors, str(chance.choice(list(COLORS))))):
        turns.append(Turn(f"How many {color} objects are there?", str(colors.count(color)), "count"))
    for shape in dict.fromkeys((*shapes, str(chance.choice(SHAPES)))):
        plural = "crosses" if shape == "cross" else f"{shape}s"
        turns.append(Turn(f"How many {plural} are there?", str(shapes.count(shape)), "count"))
    for cell, (color, shape) in zip(cells, names, strict=True):
        if shapes.count(shape) == 1:
            turns += [Turn(f"What color is the {shape}?", color, "color")] * 2
        if colors.count(color) == 1:
            turns += [Turn(f"What shape is the {color} object?", shape, "shape")] * 2
        if names.count((color, shape)) == 1:
            turns.append(Turn(f"Where is the {color} {shape}?", PLACES[cell], "position"))
        turns.append(Turn(f"What shape is at the {PLACES[cell]}?", shape, "shape"))
        turns.append(Turn(f"What color is the object at the {PLACES[cell]}?", color, "color"))
    turns += _relations(chance, cells, names)
    return [*dict.fromkeys(turns)]


def _relations(chance: np.random.Generator, cells: list[int], names: list[tuple[str, str]]) -> list[Turn]:
    turns = []
    for _ in range(2):
        i, j = chance.choice(len(cells), 2, replace=False).tolist()
        if names.count(names[i]) > 1 or names.count(names[j]) > 1:
            continue
        (y, x), (v, u) = divmod(cells[i], 3), divmod(cells[j], 3)
        said, true = [("above", y < v), ("below", y > v), ("left of", x < u), ("right of", x > u)][chance.integers(4)]
        one, other = (" ".join(names[k]) for k in (i, j))
        turns.append(Turn(f"Is the {one} {said} the {other}?", "yes" if true else "no", "relation"))
    return turns


def _draw(chance: np.random.Generator, canvas: NDArray[np.float64], cell: int, color: str, shape: str) -> None:
    y, x = (16 * k + 7.5 + chance.integers(-1, 2) for k in divmod(cell, 3))
    size = chance.uniform(4.5, 6.5)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    v, u = rows - y, columns - x
    inside = {
        "circle": v * v + u * u <= size * size,
        "square": np.maximum(abs(v), abs(u)) <= 0.85 * size,
        "triangle": (v <= 0.8 * size) & (abs(u) <= 0.6 * (v + size)),
        "cross": (np.minimum(abs(v), abs(u)) <= 0.35 * size) & (np.maximum(abs(v), abs(u)) <= size),
    }[shape]
    canvas[inside] = COLORS[color]


def _sign(chance: np.random.Generator, canvas: NDArray[np.float64]) -> list[Turn]:
    word, color = str(chance.choice(WORDS)), str(chance.choice(list(COLORS)))
    top, left = int(chance.integers(4, 30)), int(chance.integers(2, 12))
    for i, letter in enumerate(word):
        rows = np.array([int(_FONT[letter][k : k + 2], 16) for k in range(0, 14, 2)])
        bits = (rows[:, None] >> np.arange(4, -1, -1)) & 1
        large = bits.repeat(2, 0).repeat(2, 1).astype(bool)
        canvas[top : top + 14, left + 12 * i : left + 12 * i + 10][large] = COLORS[color]
    return [Turn("What word is written?", word.lower(), "text"), Turn("What color is the word?", color, "color")]


def _chart(chance: np.random.Generator, canvas: NDArray[np.float64]) -> list[Turn]:
    count = int(chance.integers(3, 5))
    colors = chance.choice(list(COLORS), count, replace=False).tolist()
    heights = (chance.permutation(7)[:count] + 1).tolist()
    for i, (color, height) in enumerate(zip(colors, heights, strict=True)):
        canvas[45 - 6 * height : 45, 3 + 11 * i : 11 + 11 * i] = COLORS[color]
    canvas[45:46, 1:47] = 200
    turns = [
        Turn("How many bars are there?", str(count), "chart"),
        Turn("Which bar is the tallest?", colors[int(np.argmax(heights))], "chart"),
        Turn("Which bar is the shortest?", colors[int(np.argmin(heights))], "chart"),
    ]
    return turns + [Turn(f"How tall is the {c} bar?", str(h), "chart") for c, h in zip(colors, heights, strict=True)]
