"""Whether the parts of a model beside its language model are quantized, where the user leaves it open: by measuring.

Each part is rounded to the scheme asked for, alone, and the divergence of the answers that this brings (KL from the
original, nats a token) is held against the bytes that it saves. A vision tower or a projector is quantized where a byte
saved in it costs no more than one saved in the language model. Ours: neither its name nor habit decides. Scales of
activations that are measured beforehand are left out of this comparison. A SigLIP tower is left as it is all the same:
transformers cannot load it packed (``qkit.preflight``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qkit.blocks import LANGUAGE, Linear
from qkit.calibrating import calibration_asked
from qkit.calibration import Calibration
from qkit.checkpoint import Checkpoint
from qkit.export.compressed_tensors import stored_bytes
from qkit.families.declared import DECLARED
from qkit.families.discover import kind_of
from qkit.families.outline import Outline
from qkit.folder import weights_folder
from qkit.formats import fit_group
from qkit.loading import load
from qkit.locate import find_model
from qkit.machine import available_cores, available_memory
from qkit.parallel import workers
from qkit.pipeline import open_outline
from qkit.preflight import holds_siglip
from qkit.qtensor import dequantize, find_params, nvfp4_global_scale, quantize
from qkit.recipe import Recipe
from qkit.request import Request, recipe_of
from qkit.run import Progress
from qkit.sensitivity.forecast import model_memory
from qkit.sensitivity.subject import Replacement, Subject
from qkit.towers import AUTO, SKIP

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


def settled(request: Request, progress: Progress) -> tuple[Request, list[str]]:
    """The request with a decision for every part that is left to measuring, and what was measured, a sentence each; as it was
    where there is nothing to decide, or no rows with pictures to decide it on, or no memory for the whole model."""
    kind = kind_of(Checkpoint.open(weights_folder(find_model(request.model))).config)
    if not any(kind in family.model_types for family in DECLARED if family.towers):
        return request, []
    recipe, outline = recipe_of(request), open_outline(request.model)
    left = [t.name for t in outline.towers if recipe.targets.get(t.name, AUTO) == AUTO]
    rows = calibration_asked(request, outline, recipe) if left else None
    available = available_memory()
    if rows is None or rows.kinds is None or (available is not None and model_memory(outline) > available):
        return request, []
    costs = measured(recipe, outline, rows.first(ROWS), request.threads or available_cores(), progress)
    own, targets, said = costs[LANGUAGE], dict(recipe.targets), []
    for tower in (t for t in outline.towers if t.name in left):
        # Figures are told, and not kept: the plan must not depend on the last digit of a sum.
        keep, why = costs[tower.name].rate > own.rate, "a byte saved in it costs more than one in the language model"
        if holds_siglip(outline.checkpoint.config, (x.name for b in tower.blocks for x in b.linears)):
            keep, why = True, f"transformers cannot load a packed SigLIP (--target {tower.name}=SCHEME packs it)"
        targets[tower.name] = f"{SKIP}: {why}" if keep else recipe.scheme
        verdict = f"left as it is: {why}" if keep else "quantized too"
        figures = f"rounding it to {recipe.scheme} costs {costs[tower.name]}, the language model {own}"
        said.append(f"{tower.name}: {verdict} ({figures})")
    return replace(request, targets=targets), said


def measured(recipe: Recipe, outline: Outline, rows: Calibration, threads: int, progress: Progress) -> dict[str, Cost]:
    """By name of the part."""
    progress.start("what rounding each part costs", 1 + len(outline.sequences))
    found = {}
    with workers(threads) as pool:
        subject = Subject(load(outline.checkpoint.path, dtype=torch.float32), outline, pool)
        reference = subject.log_probs(rows)
        progress.step()
        for sequence in outline.sequences:
            linears = [x for block in sequence.blocks for x in block.linears]
            rounded = {x.name: _rounded(recipe, subject, x) for x in linears}
            with subject.replaced(rounded):
                _, kl = subject.compare(rows, reference)
            found[sequence.name] = Cost(kl, sum(_saved(recipe, outline, x) for x in linears))
            progress.step()
    return found


def _rounded(recipe: Recipe, subject: Subject, linear: Linear) -> Replacement:
    scheme, _, _ = recipe.resolved(None)
    weight, fmt = subject.weight(linear.name), fit_group(scheme.weights, linear.shape[1])
    shared = nvfp4_global_scale(weight.abs().amax()) if fmt.scale == "e4m3" else None
    params = find_params(weight, fmt, subject.outline.dtype, global_scale=shared)
    acts = scheme.activations
    plain = acts if acts is not None and acts.dynamic and acts.strategy != "tensor_group" else None
    return Replacement(dequantize(quantize(weight, params, fmt)), plain)


def _saved(recipe: Recipe, outline: Outline, linear: Linear) -> int:
    scheme, _, _ = recipe.resolved(None)
    fmt = fit_group(scheme.weights, linear.shape[1])
    before = outline.checkpoint.tensors[f"{linear.name}.weight"].nbytes
    return before - stored_bytes(fmt, scheme.activations, linear.shape, outline.dtype)
