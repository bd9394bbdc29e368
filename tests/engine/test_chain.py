"""The model as a chain of blocks, of which one is in memory: it gives what the whole model gives, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Quiet
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qkit.calibration.batches import batches
from qkit.engine.chain import Chain, chain_of
from qkit.engine.job import Job
from qkit.files.offload import OffloadedTensors
from qkit.rounding import sliced
from qkit.runtime.loading import load
from qkit.sensitivity.hidden import chain_roots, roots
from qkit.sensitivity.reference_model import ReferenceModel
from qkit.system.parallel import workers
from qkit.workflows.quantize import Request, prepare, quantize


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"word{i * i % 97} and" for i in range(2000)))
    return file


def asked(model: Any, text: Path, **changes: Any) -> Request:
    given = {"method": "signround", "group_size": 32, "samples": 6, "seqlen": 32, "threads": 1, **changes}
    return Request(model=str(model), scheme="w4a16", calib=text, **given)


@contextmanager
def chain(request: Request, folder: Path) -> Iterator[tuple[Chain | None, Any]]:
    """In float32."""
    prepared = prepare(request)
    plan = replace(prepared.plan, run_dtype="float32")
    with Job.open(folder, {}) as job, workers(request.threads) as pool:
        yield chain_of(plan, prepared.structure, job, pool), plan


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "opt", "gpt_neox"])
def test_it_gives_what_the_model_gives(family: str, tiny: Any, text: Path, tmp_path: Path) -> None:
    path = tiny(family, torch.float32)
    model = load(path, dtype=torch.float32)
    with chain(asked(path, text), tmp_path / "job") as (cut, plan):
        assert cut is not None
        read = cut.structure.checkpoint.read
        tokens, kept = plan.calibration.tokens.clone(), OffloadedTensors(tmp_path)

        @contextmanager
        def loaded(block: Any) -> Iterator[nn.Module]:
            with cut.loaded(block, read) as module:
                for linear in block.linears:
                    module.get_parameter(linear.param).requires_grad_()
                yield module

        outputs = cut.forward([cut.entering([0, 1]), cut.entering([4])], loaded, kept)
        rows = [tokens[:2], tokens[4:5]]
        for piece, out in zip(rows, outputs, strict=True):
            with torch.no_grad():
                expected = model(piece).logits[0]
            torch.testing.assert_close(cut.head(out[0]), expected, rtol=1e-3, atol=1e-3)
        found: dict[str, Tensor] = {}
        shifted = [out + 0.1 for out in outputs]
        gradients = [
            sliced.divergence_gradient(cut.head, a.flatten(0, 1), b.flatten(0, 1), cut.vocabulary).view_as(a)
            for a, b in zip(outputs, shifted, strict=True)
        ]
        for block in cut.backward(kept, gradients, loaded):
            path, by_piece = cut.blocks[block.number][0].path, list(block.parameters)
            assert len(block.at_inputs) == len(by_piece) == len(rows)
            found.update({f"{path}.{name}": sum(g[name] for g in by_piece) for name in by_piece[0]})
        parameters = {name: model.get_parameter(name).requires_grad_() for name in found}
        last: list[Tensor] = []
        model.get_submodule(cut.blocks[-1][0].path).register_forward_hook(
            lambda _, args, out: last.append(out[0] if isinstance(out, tuple) else out)
        )
        for piece in rows:
            model(piece)
        expected = torch.autograd.grad(last, list(parameters.values()), gradients)
        assert len(found) >= 8
        for (name, ours), true in zip(found.items(), expected, strict=True):
            assert float((ours - true).norm()) < 1e-3 * float(true.norm()), name


def test_loss_weights_of_a_chain(tiny: Any, text: Path, tmp_path: Path) -> None:
    """Those of the whole model, for the same labels, and for any number of workers."""
    path = tiny("llama", torch.float32)
    found = []
    for threads in (1, 3):
        with chain(asked(path, text, threads=threads), tmp_path / str(threads)) as (cut, plan):
            assert cut is not None
            found.append(chain_roots(cut, batches(plan.calibration, 64), 7))
            whole = ReferenceModel(load(path, dtype=torch.float32), cut.structure, cut.pool)
            pieces = plan.calibration
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with chain(asked(path, text), tmp_path / "again") as (cut, _):
        assert cut is not None
        together = chain_roots(cut, batches(pieces), 7)
    with workers(1) as pool:
        expected = roots(ReferenceModel(whole.model, whole.structure, pool), pieces, 7)
    for ours, true in zip(together, expected, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-3, atol=1e-4)


class _Sizes(TorchDispatchMode):
    """Notes the largest tensor that has the vocabulary as its last dimension."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.largest, self.seen = vocabulary, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.dim() > 1 and t.shape[-1] == self.vocabulary:
                self.largest, self.seen = max(self.largest, t.numel()), self.seen + 1
        return out


def test_logits_are_never_whole(tiny: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run with all stages of learned rounding holds one slice of logits, whatever the rows and the batch are."""
    monkeypatch.setattr(
        sliced, "SLICE_LOGITS", 100 * 4096
    )  # more than the head's weights, less than the logits of a batch
    options = {"steps": 1, "batch": 8, "loss_weighted": True, "e2e_steps": 1}
    request = asked(tiny("llama"), text, samples=16, options=options)
    with _Sizes(4096) as sizes:
        assert quantize(request, tmp_path / "out", Quiet()).ok
    assert sizes.seen > 100 and sizes.largest <= sliced.SLICE_LOGITS


def test_a_model_that_is_no_chain(tiny: Any, text: Path, tmp_path: Path) -> None:
    """What is behind its last block is more than the norm that the family names."""
    request = asked(tiny("llama"), text)
    prepared = prepare(request)
    base: Any = prepared.structure.model.base_model
    with Job.open(tmp_path / "job", {}) as job, workers(1) as pool:
        handle = base.register_forward_hook(lambda _, args, out: out.__class__(last_hidden_state=out[0] + 3))
        assert chain_of(prepared.plan, prepared.structure, job, pool) is None
        handle.remove()
        assert chain_of(prepared.plan, prepared.structure, job, pool) is not None
