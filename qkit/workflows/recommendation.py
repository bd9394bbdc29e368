"""What ``qkit recommend`` compares and returns, and what it chooses."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qkit.system.words import megabytes

NEGLIGIBLE = (
    0.01  # nats a token; our choice: about one percent of perplexity, the limit of 'serve-command --measure' too
)
MIXED = "mixed"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One scheme on the machine, with the best KV cache that leaves room.

    kernels: what runs its layers; weights, cache_bytes, activations: bytes, at the context; loss: expected KL divergence in
    nats a token, weights and cache together; refused: why the engine does not load it; fits:
    whether it is within the memory
    """

    scheme: str
    weights: int = 0
    cache: str = ""
    cache_bytes: int = 0
    activations: int = 0
    loss: float = 0.0
    kernels: tuple[str, ...] = ()
    refused: str = ""
    fits: bool = False

    @property
    def total(self) -> int:
        """Bytes of all that is counted."""
        return self.weights + self.cache_bytes + self.activations


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """memory, usable: bytes of all GPUs, and what the engine has of them; evidence: what the losses rest on; chosen: None where
    nothing fits

    plain: the model as it is; tokens: of KV caches that the memory holds beside the chosen file; commands: to make, check and
    serve it; notes: what else to know; remedy: what to change where nothing fits
    """

    model: str
    engine: str
    device: str | None
    gpus: int
    memory: int
    usable: int
    context: int
    evidence: str
    plain: Candidate
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    why: str
    tokens: int | None
    commands: tuple[str, ...]
    notes: tuple[str, ...]
    remedy: str

    def to_json(self) -> dict[str, Any]:
        """All fields, with the totals."""
        data = asdict(self)
        for name in ("plain", "chosen"):
            if data[name] is not None:
                data[name]["total"] = getattr(self, name).total
        for entry, candidate in zip(data["candidates"], self.candidates, strict=True):
            entry["total"] = candidate.total
        return data


def choose(found: list[Candidate]) -> tuple[Candidate | None, str]:
    """(what is recommended of what fits, why): the smallest one whose loss is negligible, else the one of least loss."""
    fitting = [c for c in found if c.fits]
    if not fitting:
        smallest = smallest_of(found)
        if smallest is None:
            return None, "every scheme is left out"
        return None, f"the smallest of them, {smallest.scheme}, needs {megabytes(smallest.total)}"
    small = [c for c in fitting if c.loss <= NEGLIGIBLE]
    if small:
        return min(small, key=lambda c: (c.total, c.loss)), f"the smallest with an expected loss below {NEGLIGIBLE:g}"
    return min(fitting, key=lambda c: (c.loss, c.total)), "the least expected loss of what fits"


def smallest_of(found: list[Candidate]) -> Candidate | None:
    """The candidate of fewest bytes among those that the engine loads."""
    return min((c for c in found if not c.refused), key=lambda c: c.total, default=None)


def order(c: Candidate) -> tuple[bool, bool, float, int]:
    """A key for sorting: what fits first, then by loss."""
    return bool(c.refused), not c.fits, c.loss, c.total
