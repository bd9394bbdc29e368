"""Whether the parts of a model beside its language model are quantized, where the user leaves it open: by measuring.

Each part is rounded to the scheme asked for, alone, and the divergence of the answers that this brings (KL from the
original, nats a token) is held against the bytes that it saves. A vision tower or a projector is quantized where a byte
saved in it costs no more than one saved in the language model. Ours: neither its name nor habit decides. Scales of
activations that are measured beforehand are left out of this comparison. A SigLIP tower is left as it is all the same:
transformers cannot load it packed (``qkit.verification.engines``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qkit.calibration.dataset import Calibration
from qkit.families.blocks import LANGUAGE, Linear
from qkit.families.declared import DECLARED
from qkit.families.discover import kind_of
from qkit.families.structure import ModelStructure
from qkit.files.checkpoint import Checkpoint
from qkit.files.folder import weights_folder
from qkit.files.locate import find_model
from qkit.planning.recipe import Recipe
from qkit.planning.request import Request, recipe_of
from qkit.planning.towers import AUTO, SKIP
from qkit.runtime.loading import load
from qkit.sensitivity.forecast import model_memory
from qkit.sensitivity.reference_model import ReferenceModel, Replacement
from qkit.system.machine import available_cores, available_memory
from qkit.system.parallel import workers
from qkit.system.progress import Progress
from qkit.tensor.compressed_tensors import stored_bytes
from qkit.tensor.formats import Format, Scheme, fit_group
from qkit.tensor.qtensor import dequantize, find_params, quantize
from qkit.verification.engines import holds_siglip
from qkit.workflows.calibration_rows import calibration_asked
from qkit.workflows.quantize import open_structure

ROWS = 32  # of calibration, at the most; our choice


@dataclass(frozen=True)
class Cost:
    """What rounding one part brings. kl: nats an answer token; saved: bytes"""

    kl: float
    saved: int

    @property
    def rate(self) -> float:
        """Nats a byte."""
        return self.kl / max(1, self.saved)

    def __str__(self) -> str:
        return f"{self.kl:.3g} nats for {self.saved / 1e6:.2f} MB"


@dataclass(frozen=True, kw_only=True)
class Open:
    """What a request leaves open of the parts beside the language model. request: with those decided that need no measuring,
    said: what was decided, a sentence each; left: parts to be measured, on ``rows``."""

    request: Request
    said: tuple[str, ...] = ()
    recipe: Recipe | None = None
    structure: ModelStructure | None = None
    left: tuple[str, ...] = ()
    rows: Calibration | None = None


def opened(request: Request) -> Open:
    """Look at a request without measuring. Nothing is left where there are no rows with pictures to decide it on, or no memory
    for the whole model: such parts stay as they are."""
    kind = kind_of(Checkpoint.open(weights_folder(find_model(request.model))).config)
    if not any(kind in family.model_types for family in DECLARED if family.towers):
        return Open(request=request)
    recipe, structure = recipe_of(request), open_structure(request.model)
    open_ = [t for t in structure.towers if recipe.targets.get(t.name, AUTO) == AUTO]
    rows = calibration_asked(request, structure, recipe) if open_ else None
    available = available_memory()
    if rows is None or rows.kinds is None or (available is not None and model_memory(structure) > available):
        return Open(request=request)
    targets, said, left = dict(recipe.targets), list[str](), list[str]()
    for t in open_:
        if holds_siglip(structure.checkpoint.config, (x.name for b in t.blocks for x in b.linears)):
            why = f"transformers cannot load a packed SigLIP (--target {t.name}=SCHEME packs it)"
            targets[t.name] = f"{SKIP}: {why}"
            said.append(f"{t.name}: left as it is: {why}")
        else:
            left.append(t.name)
    return Open(
        request=replace(request, targets=targets),
        said=tuple(said),
        recipe=recipe,
        structure=structure,
        left=tuple(left),
        rows=rows.first(ROWS),
    )


def resolve_towers(request: Request, progress: Progress) -> tuple[Request, list[str]]:
    """The request with a decision for every part that is left to measuring, and what was decided, a sentence each."""
    found = opened(request)
    decided, said = settle(found, progress)
    return decided, [*found.said, *said]


def settle(found: Open, progress: Progress) -> tuple[Request, list[str]]:
    """The same of what was left open, and what measuring says of it."""
    if not found.left:
        return found.request, []
    recipe, structure, rows = found.recipe, found.structure, found.rows
    assert recipe is not None and structure is not None and rows is not None
    costs = measured(recipe, structure, rows, found.request.threads or available_cores(), progress)
    own, targets, said = costs[LANGUAGE], dict(found.request.targets or {}), list[str]()
    for name in found.left:
        # Figures are told, and not kept: the plan must not depend on the last digit of a sum.
        keep, why = costs[name].rate > own.rate, "a byte saved in it costs more than one in the language model"
        targets[name] = f"{SKIP}: {why}" if keep else recipe.scheme
        verdict = f"left as it is: {why}" if keep else "quantized too"
        figures = f"rounding it to {recipe.scheme} costs {costs[name]}, the language model {own}"
        said.append(f"{name}: {verdict} ({figures})")
    return replace(found.request, targets=targets), said


def measured(
    recipe: Recipe, structure: ModelStructure, rows: Calibration, threads: int, progress: Progress
) -> dict[str, Cost]:
    """By name of the part."""
    progress.start("cost of rounding each part", 1 + len(structure.sequences))
    found = {}
    with workers(threads) as pool:
        subject = ReferenceModel(load(structure.checkpoint.path, dtype=torch.float32), structure, pool)
        reference = subject.log_probs(rows)
        progress.step()
        for sequence in structure.sequences:
            scheme, _, _ = recipe.resolved(None)
            formats = {
                x: fit_group(scheme.weights, *(y.shape[1] for g in groups for y in g.linears))
                for block in sequence.blocks
                for groups in block.units
                for g in groups
                for x in g.linears
            }
            rounded = {
                x.name: _rounded(Scheme(scheme.name, fmt, scheme.activations), subject, x) for x, fmt in formats.items()
            }
            with subject.replaced(rounded):
                _, kl = subject.compare(rows, reference)
            found[sequence.name] = Cost(
                kl, sum(_saved(fmt, scheme.activations, structure, x) for x, fmt in formats.items())
            )
            progress.step()
    return found


def _rounded(scheme: Scheme, subject: ReferenceModel, linear: Linear) -> Replacement:
    weight, fmt = subject.weight(linear.name), scheme.weights
    params = find_params(weight, fmt, subject.structure.dtype)
    acts = scheme.activations
    plain = acts if acts is not None and acts.dynamic and acts.strategy != "tensor_group" else None
    return Replacement(dequantize(quantize(weight, params, fmt)), plain)


def _saved(weights: Format, activations: Format | None, structure: ModelStructure, linear: Linear) -> int:
    before = structure.checkpoint.tensors[f"{linear.name}.weight"].nbytes
    return before - stored_bytes(weights, activations, linear.shape, structure.dtype)
