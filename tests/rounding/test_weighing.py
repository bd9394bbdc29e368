"""Errors weighed by what the loss makes of them: the matrix, and what is learned by it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import qkit_data
import torch
from conftest import Quiet, Stops
from torch import Tensor

from qkit.errors import Unsupported, UsageError
from qkit.runtime.loading import load, load_tokenizer
from qkit.sensitivity.hidden import PLAIN, roots
from qkit.sensitivity.reference_model import ReferenceModel
from qkit.system.parallel import workers
from qkit.workflows.quantize import Request, open_structure, prepare, quantize


@pytest.fixture(scope="module")
def subject():
    with workers(2) as pool:
        yield ReferenceModel(load("tiny-llama", dtype=torch.float32), open_structure("tiny-llama"), pool)


@pytest.fixture(scope="module")
def rows() -> Tensor:
    text = qkit_data.text_path("calibration").read_text(encoding="utf-8")[:80_000]
    ids = load_tokenizer("tiny-llama")(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: 16 * 128]).view(16, 128)


def divergence(subject: ReferenceModel, rows: Tensor, block: int, direction: Tensor) -> float:
    """Mean KL divergence where the hidden state of each token behind a block moves along the direction, this way or that."""
    signs = torch.randn(*rows.shape, 1, generator=torch.Generator().manual_seed(1)).sign()
    start = iter(range(0, len(rows), 8))

    def move(module, args, output):
        i = next(start)
        return output + 0.05 * signs[i : i + 8] * direction

    before = subject.log_probs(rows)
    with workers(1) as alone:
        one = ReferenceModel(subject.model, subject.structure, alone)
        handle = subject.model.get_submodule(subject.structure.blocks[block].path).register_forward_hook(move)
        try:
            return one.compare(rows, before)[1]
        finally:
            handle.remove()


def test_it_tells_what_an_error_costs(subject: ReferenceModel, rows: Tensor) -> None:
    """Directions in which F says that errors cost more, and by how much, on the same rows."""
    found = roots(subject, rows, seed=0)
    assert len(found) == len(subject.structure.blocks)
    for block in (2, 6):
        mixed = found[block] @ found[block].T
        assert float(mixed.diagonal().mean()) == pytest.approx(1.0, rel=1e-4)
        plain = torch.eye(len(mixed))
        f = (mixed - PLAIN * plain) / (1 - PLAIN)
        values, vectors = torch.linalg.eigh(f)
        middle, top = vectors[:, len(f) // 2], vectors[:, -1]
        told = float(values[-1] / values[len(f) // 2])
        true = divergence(subject, rows, block, top) / divergence(subject, rows, block, middle)
        assert told > 2 and 0.5 * told < true < 1.5 * told


def test_nothing_depends_on_the_workers(subject: ReferenceModel, rows: Tensor) -> None:
    with workers(1) as pool:
        alone = roots(ReferenceModel(subject.model, subject.structure, pool), rows, seed=0)
    for a, b, other in zip(roots(subject, rows, seed=0), alone, roots(subject, rows, seed=1), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, other)


@pytest.fixture
def asked(tiny, tmp_path: Path) -> Request:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{i * i % 97} and" for i in range(4000)))
    options = {"steps": 24, "batch": 4, "loss_weighted": True}
    return Request(
        model=str(tiny("llama")),
        scheme="w3a16",
        method="gptq+signround",
        group_size=32,
        calib=text,
        samples=32,
        seqlen=32,
        threads=1,
        options=options,
    )


def sums(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("*.safetensors")}


def test_a_run_and_one_that_stopped(asked: Request, tmp_path: Path) -> None:
    out, other, stopped, plain = (tmp_path / name for name in ("out", "other", "stopped", "plain"))
    assert quantize(asked, out, Quiet()).ok
    quantize(replace(asked, threads=3), other, Quiet())
    with pytest.raises(KeyboardInterrupt):
        quantize(asked, stopped, Stops(9))
    quantize(asked, stopped, Quiet())
    quantize(replace(asked, options={"steps": 24, "batch": 4}), plain, Quiet())
    assert sums(out) == sums(other) == sums(stopped) != sums(plain)


def test_its_memory_is_told(asked: Request) -> None:
    structure, memory = prepare(asked).structure, prepare(asked).forecast.memory
    head = 4 * structure.text_config.vocab_size * structure.text_config.hidden_size
    assert memory["errors weighted by the loss"] > head + 32 * 32 * 4 * structure.text_config.hidden_size


def test_bad_input(asked: Request) -> None:
    with pytest.raises(UsageError, match="option 'loss_weighted' and method rotate exclude each other"):
        prepare(replace(asked, method="rotate+gptq+signround"))
    with pytest.raises(
        Unsupported, match="option 'loss_weighted' needs the loss of a language model, and this is none"
    ):
        prepare(Request(model="tiny-video", scheme="w4a8", method="gptq+signround", options={"loss_weighted": True}))
    with pytest.raises(UsageError, match="loss_weighted"):
        prepare(replace(asked, method="gptq", options={"loss_weighted": True}))
