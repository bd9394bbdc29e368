"""The decision to quantize the parts beside a language model, by measuring, where the user leaves it open.

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
from qkit.runtime.loading import load_checkpoint
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
class TowerCost:
    """The cost of rounding one part. kl: nats an answer token; saved: bytes"""

    kl: float
    saved: int

    @property
    def rate(self) -> float:
        """The nats per saved byte."""
        return self.kl / max(1, self.saved)

    def __str__(self) -> str:
        return f"{self.kl:.3g} nats for {self.saved / 1e6:.2f} MB"


@dataclass(frozen=True, kw_only=True)
class OpenTowers:
    """The parts beside the language model that a request leaves open. request: with those decided that need no measuring,
    notes: what was decided, a sentence each; undecided: parts to be measured, on ``rows``."""

    request: Request
    notes: tuple[str, ...] = ()
    recipe: Recipe | None = None
    structure: ModelStructure | None = None
    undecided: tuple[str, ...] = ()
    rows: Calibration | None = None


def open_towers(request: Request) -> OpenTowers:
    """The parts that a request leaves open, found without measuring. There are none where there are no rows with images to
    decide on, or no memory for the whole model: such parts stay as they are."""
    kind = kind_of(Checkpoint.open(weights_folder(find_model(request.model)), adapter=request.adapter).config)
    if not any(kind in family.model_types for family in DECLARED if family.towers):
        return OpenTowers(request=request)
    recipe, structure = recipe_of(request), open_structure(request.model, adapter=request.adapter)
    auto_towers = [t for t in structure.towers if recipe.targets.get(t.name, AUTO) == AUTO]
    rows = calibration_asked(request, structure, recipe) if auto_towers else None
    available = available_memory()
    if rows is None or rows.kinds is None or (available is not None and model_memory(structure) > available):
        return OpenTowers(request=request)
    targets, notes, undecided = dict(recipe.targets), list[str](), list[str]()
    for t in auto_towers:
        if holds_siglip(structure.checkpoint.config, (x.name for b in t.blocks for x in b.linears)):
            reason = f"transformers cannot load a packed SigLIP (--target {t.name}=SCHEME packs it)"
            targets[t.name] = f"{SKIP}: {reason}"
            notes.append(f"{t.name}: left as it is: {reason}")
        else:
            undecided.append(t.name)
    return OpenTowers(
        request=replace(request, targets=targets),
        notes=tuple(notes),
        recipe=recipe,
        structure=structure,
        undecided=tuple(undecided),
        rows=rows.first(ROWS),
    )


def resolve_towers(request: Request, progress: Progress) -> tuple[Request, list[str]]:
    """The request with a decision for every part that is left to measuring, and the decisions in words, a sentence each."""
    towers = open_towers(request)
    decided, notes = decide_towers(towers, progress)
    return decided, [*towers.notes, *notes]


def decide_towers(towers: OpenTowers, progress: Progress) -> tuple[Request, list[str]]:
    """The request with a decision, by measuring, for every open part, and the decisions in words."""
    if not towers.undecided:
        return towers.request, []
    recipe, structure, rows = towers.recipe, towers.structure, towers.rows
    assert recipe is not None and structure is not None and rows is not None
    costs = measure_towers(recipe, structure, rows, towers.request.threads or available_cores(), progress)
    language_cost, targets, notes = costs[LANGUAGE], dict(towers.request.targets or {}), list[str]()
    for name in towers.undecided:
        # Figures are printed, and not stored: the plan must not depend on the last digit of a sum.
        keep = costs[name].rate > language_cost.rate
        reason = "a byte saved in it costs more than one in the language model"
        targets[name] = f"{SKIP}: {reason}" if keep else recipe.scheme
        verdict = f"left as it is: {reason}" if keep else "quantized too"
        figures = f"rounding it to {recipe.scheme} costs {costs[name]}, the language model {language_cost}"
        notes.append(f"{name}: {verdict} ({figures})")
    return replace(towers.request, targets=targets), notes


def measure_towers(
    recipe: Recipe, structure: ModelStructure, rows: Calibration, threads: int, progress: Progress
) -> dict[str, TowerCost]:
    "By name of the part."
    progress.start("cost of rounding each part", 1 + len(structure.sequences))
    costs = {}
    with workers(threads) as pool:
        original = ReferenceModel(load_checkpoint(structure.checkpoint, torch.float32), structure, pool)
        reference = original.log_probs(rows)
        progress.step()
        for sequence in structure.sequences:
            scheme, _, _ = recipe.resolve(None)
            formats = {
                x: fit_group(scheme.weights, *(y.shape[1] for g in groups for y in g.linears))
                for block in sequence.blocks
                for groups in block.units
                for g in groups
                for x in g.linears
            }
            rounded = {
                x.name: _round_linear(Scheme(scheme.name, fmt, scheme.activations), original, x)
                for x, fmt in formats.items()
            }
            with original.replaced(rounded):
                _, kl = original.compare(rows, reference)
            costs[sequence.name] = TowerCost(
                kl, sum(_saved_bytes(fmt, scheme.activations, structure, x) for x, fmt in formats.items())
            )
            progress.step()
    return costs


def _round_linear(scheme: Scheme, original: ReferenceModel, linear: Linear) -> Replacement:
    weight, fmt = original.weight(linear.name), scheme.weights
    params = find_params(weight, fmt, original.structure.dtype)
    acts = scheme.activations
    input_format = acts if acts is not None and acts.dynamic and acts.strategy != "tensor_group" else None
    return Replacement(dequantize(quantize(weight, params, fmt)), input_format)


def _saved_bytes(weights: Format, activations: Format | None, structure: ModelStructure, linear: Linear) -> int:
    before = structure.checkpoint.tensors[f"{linear.name}.weight"].nbytes
    return before - stored_bytes(weights, activations, linear.shape, structure.dtype)
