"""How far a file is from the model that it was made from: each weight, worst first, and what may explain it.

Rounding explains an error that the format and the original give. A fold explains a weight whose columns or rows are scaled,
where a norm or another linear of the block is scaled the other way. What is left is a fault: other weights, an exchanged
layer, rows in another order, or noise.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qkit.diagnosis.findings import Findings
from qkit.diagnosis.rounding import rounding_error
from qkit.tensor.formats import Format

_TIMES, _FLOOR, _MOST = 3.0, 0.02, 0.9  # the limit: so many times what rounding explains, and never above the last
_MOST_LAYERS, _FEW_LAYERS, _UNLIKE = 0.6, 4, 0.3  # shares of all weights, and a cosine, that tell another model
_SLIGHT, _SLIGHT_LEFT = 1.05, 0.5  # times what rounding explains; share of a norm's change that columns leave
_SCALED = 0.05  # of the logarithm of a factor
_FEW_SIZES, _SAME_SIZES = 16, 0.9  # a correlation
_BLOCK = re.compile(r"(.*?\b(?:layers|blk|blocks|h)\.\d+)\.")
_SAMPLE = (16, 1024)
_ADVICE = "quantize the layer again, from this original"
Base = Callable[[str], Tensor | None]


@dataclass
class LayerDrift:
    """One weight. error: relative to the original; explained: by rounding; columns, rows: factors of a fold; matches: the
    cosine with the original; rotated: whether it has nothing in common with it but the sizes of its rows or columns"""

    name: str
    error: float
    explained: float
    shape: tuple[int, ...]
    fitted: float = 0.0
    columns: Tensor | None = None
    rows: Tensor | None = None
    sample: Tensor | None = None
    matches: float = 1.0
    reordered: str = ""
    rotated: bool = False

    @property
    def limit(self) -> float:
        """The largest error that is no finding."""
        return min(_MOST, _TIMES * self.explained + _FLOOR)

    def to_json(self) -> dict[str, Any]:
        """The numbers of a line."""
        return {"layer": self.name, "error": round(self.error, 6), "explained": round(self.explained, 6)}


@dataclass
class Drift:
    """Collects weights one by one. base: reads the original of a name; names: of all matrices that the original has;
    unread: layers whose weights could not be decoded; related: whether the original is the model of the file"""

    base: Base
    names: list[str]
    offsets: tuple[float, ...] = (0.0, 1.0)
    layers: list[LayerDrift] = field(default_factory=list)
    norms: dict[str, list[Tensor]] = field(default_factory=dict)
    vectors: dict[str, float] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)
    related: bool = True
    samples: dict[str, tuple[Tensor | None, tuple[int, ...]]] = field(default_factory=dict)

    def add(self, name: str, weight: Tensor, fmt: Format | None) -> bool:
        """Compare one weight; whether the original has it in this shape."""
        original = self.base(name)
        if original is None or original.shape != weight.shape:
            return False
        b, w = original.to(torch.float32), weight.to(torch.float32)
        if not bool(w.isfinite().all()):
            return True
        norm = float(b.norm()) or 1.0
        if b.dim() < 2:
            self._add_vector(name, w, b, norm)
            return True
        b, w = b.reshape(-1, b.shape[-1]), w.reshape(-1, w.shape[-1])
        found = LayerDrift(name, float((w - b).norm()) / norm, rounding_error(b, fmt), tuple(original.shape))
        if found.error > found.limit:
            self._explain(found, w, b)
        elif fmt is not None:
            self._rows(found, w, b)
            if found.error > _SLIGHT * found.explained:  # a fold by small factors is hidden in the error of rounding
                found.columns, found.rows, found.fitted = _fit(w, b)
        self.layers.append(found)
        return True

    def _add_vector(self, name: str, w: Tensor, b: Tensor, norm: float) -> None:
        error = float((w - b).norm()) / norm
        if error > 1 / 64:
            self.vectors[name] = error
            self.norms[name] = [_log_ratio(w + offset, b + offset) for offset in self.offsets]

    def _rows(self, found: LayerDrift, w: Tensor, b: Tensor) -> None:
        """A few rows that are far off in a weight that is right as a whole."""
        sizes, apart = b.norm(dim=1), (w - b).norm(dim=1)
        large = sizes > 0.1 * sizes.median()
        errors = apart[large] / sizes[large]
        if len(errors) > 8:
            wrong = errors > max(0.7, 6 * float(errors.median()))
            if 0 < int(wrong.sum()):
                found.reordered = f"{int(wrong.sum())} of its {len(w)} rows"

    def _explain(self, found: LayerDrift, w: Tensor, b: Tensor) -> None:
        found.matches = float((w * b).sum() / (w.norm() * b.norm()).clamp(min=1e-12))
        found.columns, found.rows, found.fitted = _fit(w, b)
        found.sample = _sample(w)
        found.rotated = found.matches < _UNLIKE and any(_alike(w.norm(dim=d), b.norm(dim=d)) for d in (0, 1))
        a, c = w.norm(dim=1).sort().values, b.norm(dim=1).sort().values
        if found.matches < 0.5 and float((a - c).norm() / c.norm().clamp(min=1e-12)) < max(0.05, found.explained / 2):
            found.reordered = "its rows"
        a, c = w.norm(dim=0).sort().values, b.norm(dim=0).sort().values
        if found.matches < 0.5 and not found.reordered:
            close = float((a - c).norm() / c.norm().clamp(min=1e-12)) < max(0.05, found.explained / 2)
            found.reordered = "its columns" if close and float(c.std() / c.mean()) > 0.02 else ""

    # ---- the verdict ---------------------------------------------------------------------------------------------

    def report(self, findings: Findings) -> None:
        """Note what nothing explains."""
        far = [x for x in self.layers if x.error > x.limit]
        if self._is_another_model(far, findings):
            return
        explained = {x.name for x in far if x.fitted <= x.limit and self._is_folded(x)}
        for x in far:
            if x.name not in explained:
                self._report_one(x, findings)
        if explained:
            findings.note(
                "drift", sorted(explained), "its weights are scaled by row or column, and its block makes up for it"
            )
        for x in self.layers:
            if x.error <= x.limit and x.reordered:
                findings.fault(
                    "drift", x.name, f"{x.reordered} are much further from the original than the others", "rows of one quality",
                    _ADVICE, 7,
                )  # fmt: skip
        self._report_vectors(explained, findings)

    def _is_another_model(self, far: list[LayerDrift], findings: Findings) -> bool:
        """Whether most weights are not those of the original, which one finding says."""
        other = [x for x in far if x.fitted > x.limit]
        if len(other) <= _MOST_LAYERS * len(self.layers) or len(self.layers) <= _FEW_LAYERS:
            return False
        self.related = False
        names, some = [x.name for x in other], f"{len(other)} of {len(self.layers)} weights"
        unlike = [x for x in other if x.matches < _UNLIKE]
        if any(x.rotated for x in unlike):
            findings.warn(
                "baseline", names, f"{some} have nothing in common with the baseline but the sizes of their rows or columns",
                "weights that were not rotated", "measure the quality of the model: rotated weights cannot be compared", 8,
            )  # fmt: skip
            return True
        apart, explained = (statistics.median(v) for v in zip(*((x.error, x.explained) for x in other), strict=True))
        how = "have nothing in common with the baseline" if len(unlike) > len(other) / 2 else (
            f"are {apart:.3f} from the baseline (median, relative), and rounding explains {explained:.3f}: it may be another "
            "fine-tune of one model, or the file was quantized from a quantized one"
        )  # fmt: skip
        findings.fault(
            "baseline", names, f"this is not the model that the file was made from: {some} {how}", "the original of this file",
            "give its original as --baseline, or leave the option out", 9.5,
        )  # fmt: skip
        return True

    def _report_one(self, x: LayerDrift, findings: Findings) -> None:
        expected = f"at most {x.limit:.3f}: rounding explains {x.explained:.3f}"
        found = f"it is {x.error:.3f} from the original (relative)"
        twin = self._twin(x)
        if twin is not None:
            findings.fault(
                "swapped layers",
                x.name,
                f"it holds the weights of {twin}",
                f"its own ({expected})",
                _ADVICE,
                9 + x.error,
            )
        elif x.reordered:
            findings.fault(
                "permuted layers",
                x.name,
                f"{found}: {x.reordered} are in another order",
                expected,
                _ADVICE,
                9 + x.error,
            )
        elif x.fitted <= x.limit:
            factor = float(x.rows.median()) if x.rows is not None else 1.0
            words = f"its weights are scaled (by about {factor:.3g}), and nothing in its block makes up for it"
            findings.fault("drift", x.name, f"{found}: {words}", expected, _ADVICE, 8 + x.error)
        else:
            findings.fault("drift", x.name, found, expected, _ADVICE, 8 + x.error)

    def _twin(self, x: LayerDrift) -> str | None:
        """The layer of the original whose weights these are, if they are another's."""
        if x.sample is None or x.matches > 0.5:
            return None
        for name in self.names:
            if name == x.name:
                continue
            if name not in self.samples:
                other = self.base(name)
                made = None if other is None else _sample(other.to(torch.float32).reshape(-1, other.shape[-1]))
                self.samples[name] = made, () if other is None else tuple(other.shape)
            sample, shape = self.samples[name]
            if sample is None or shape != x.shape:
                continue
            if float((sample * x.sample).sum() / (sample.norm() * x.sample.norm()).clamp(min=1e-12)) > 0.7:
                return name
        return None

    def _is_folded(self, x: LayerDrift) -> bool:
        """Whether something in the block is scaled the other way."""
        block = _block(x.name)
        assert x.columns is not None and x.rows is not None
        vectors = [v for name, vs in self.norms.items() if _block(name) == block for v in vs]
        others = [
            y
            for y in self.layers
            if y is not x and y.rows is not None and _block(y.name) == block and y.fitted <= y.limit
        ]
        row_logs, column_logs = (
            [y.rows.log() for y in others if y.rows is not None],
            [y.columns.log() for y in others if y.columns is not None],
        )
        columns, rows = x.columns.log(), x.rows.log()
        fine = True
        if float(columns.std()) > _SCALED:
            fine &= any(_cancels(columns, v) for v in (*vectors, *row_logs))
        if float(rows.std()) > _SCALED:
            fine &= any(_cancels(rows, v) for v in column_logs)
        if float(columns.std()) <= _SCALED >= float(rows.std()):
            factor = float(rows.median())
            fine &= any(abs(factor + float(v.median())) < _SCALED for v in (*vectors, *row_logs))
        return fine

    def _is_undone(self, name: str) -> bool:
        """Whether the columns of a weight of its block are scaled the other way."""
        columns = [x.columns.log() for x in self.layers if x.columns is not None and _block(x.name) == _block(name)]
        pairs = [(c, v) for v in self.norms[name] for c in columns if len(c) == len(v)]
        return any(float((c + v).std()) < _SLIGHT_LEFT * float(v.std()) for c, v in pairs)

    def _report_vectors(self, explained: set[str], findings: Findings) -> None:
        wrong: dict[str, float] = {}
        for name, error in self.vectors.items():
            block = _block(name)
            if any(_block(n) == block for n in explained) or self._is_undone(name):
                continue
            if any(_block(n) == block for n in self.unread):
                findings.note(
                    "norms", name, f"it is {error:.3f} from the original, and weights of its block were not decoded"
                )
                continue
            wrong[name] = error
        if len(wrong) > _FEW_LAYERS:  # one finding for all
            middle = statistics.median(wrong.values())
            findings.fault(
                "norms", wrong, f"{len(wrong)} vectors are {middle:.3f} from the original (median, relative), and no weight of "
                "their blocks is scaled the other way: it may be another fine-tune of one model", "the tensors of the original",
                "give the original of this file as --baseline, or copy the tensors from it", 7,
            )  # fmt: skip
            return
        for name, error in wrong.items():
            is_norm = "norm" in name or name.rpartition(".")[0].endswith(("ln_1", "ln_2", "ln_f"))
            found = (
                f"it is {error:.3f} from the original (relative), and no weight of its block is scaled the other way"
            )
            add, kind = (findings.fault, "norms") if is_norm else (findings.warn, "plain tensors")
            add(kind, name, found, "the tensor of the original", "copy it from the original", 7)


def _block(name: str) -> str:
    found = _BLOCK.match(name)
    return found[1] if found else ""


def _log_ratio(w: Tensor, b: Tensor) -> Tensor:
    ratio = w / torch.where(b == 0, torch.full_like(b, 1e-12), b)
    return ratio.abs().clamp(1e-6, 1e6).log()


def _cancels(a: Tensor, b: Tensor) -> bool:
    """Whether two logarithms of factors add up to a constant; heads that several queries share may repeat."""
    if float(b.std()) <= _SCALED:
        return False
    if len(a) != len(b):
        return len(a) % len(b) == 0 or len(b) % len(a) == 0
    return float((a + b).std()) < max(0.1, 0.35 * float(a.std()))


def _fit(w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, float]:
    """Factors of columns and rows with which the original comes nearest to a weight, and the error that is left."""
    rows = torch.ones(len(b))
    columns = torch.ones(b.shape[1])
    tiny = 1e-12
    for _ in range(3):
        scaled = b * rows[:, None]
        columns = ((w * scaled).sum(0) / scaled.square().sum(0).clamp(min=tiny)).clamp(min=1e-6)
        scaled = b * columns
        rows = ((w * scaled).sum(1) / scaled.square().sum(1).clamp(min=tiny)).clamp(min=1e-6)
    middle = columns.log().mean().exp()
    columns, rows = columns / middle, rows * middle
    left = float((w - rows[:, None] * b * columns).norm() / w.norm().clamp(min=tiny))
    return columns, rows, left


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether sizes go up and down together, which those of unrelated weights do not."""
    a, b = a - a.mean(), b - b.mean()
    return len(a) > _FEW_SIZES and float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-12)) > _SAME_SIZES


def _sample(w: Tensor) -> Tensor:
    step = max(1, len(w) // _SAMPLE[0])
    return w[::step][: _SAMPLE[0], : _SAMPLE[1]].clone()
