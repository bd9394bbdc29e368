"""The calibration rows that follow from a request."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from qkit.calibration.dataset import Calibration, calibration_rows
from qkit.calibration.image_text import (
    drawn,
    image_tokens,
    is_dataset,
    load_processor,
    pair_rows,
    read_pairs,
    refuse_chat,
)
from qkit.diffusion.pipeline import check_pipeline
from qkit.diffusion.trajectory import Trajectory, check_call, sampling_of
from qkit.errors import Unsupported, UsageError
from qkit.families.discover import BY_BATCH, kind_of
from qkit.families.structure import ModelStructure
from qkit.files.embedded import embedded_text
from qkit.files.folder import is_pipeline
from qkit.files.locate import find_model
from qkit.planning.plan import LinearPlan, is_static, why_rows
from qkit.planning.recipe import Recipe, parse_method
from qkit.planning.request import Request, check_rows
from qkit.runtime.loading import load_tokenizer
from qkit.system.extras import needs
from qkit.system.machine import available_memory, run_dtype


def calibration_asked(
    request: Request, structure: ModelStructure, recipe: Recipe, rows: Calibration | None = None
) -> Calibration | None:
    """The rows of the request, made or at hand, whether or not the plan will turn out to need them (it drops them if not)."""
    check_rows(request)
    if structure.family.encodes or not (_may_need_rows(recipe) or is_static(request.kv) or request.calib is not None):
        return None  # what a text encoder would need rows for is refused
    return rows or calibration_of(request, structure)


def calibration_of(request: Request, structure: ModelStructure) -> Calibration:
    """The rows that a request says: pairs of pictures and answers, rows of a text, or calls along a trajectory."""
    check_rows(request)
    plain = structure.family.streams is None and not wants_pairs(request, structure)
    if request.written and not plain:
        raise UsageError(
            f"--written {request.written}: a model writes rows of text, and those of a {kind_of(structure.checkpoint.config)} "
            "are more than that: leave it out"
        )
    if plain:
        return replace(text_rows(request, structure), written=request.written)
    return trajectory_rows(request, structure) if structure.family.streams else pair_calibration(request, structure)


def wants_pairs(request: Request, structure: ModelStructure) -> bool:
    """Whether rows have pictures: those of a vision-language model do, unless the user gives a text."""
    given = request.calib
    pairs = given is not None and (given.is_dir() or given.suffix == ".jsonl" or is_dataset(given))
    if structure.family.text_types:
        return given is None or pairs
    if pairs and given is not None and given.is_file():
        refuse_chat(given)
    if pairs:
        raise UsageError(
            f"--calib {given}: pairs of pictures and answers are for a vision-language model, and this is a "
            f"{kind_of(structure.checkpoint.config)}: give a text file"
        )
    return False


def pair_calibration(request: Request, structure: ModelStructure, held_out: bool = False) -> Calibration:
    """Rows of pictures, questions and answers: the user's, or drawn scenes; held_out: scenes that calibration does not use."""
    if request.calib is None:
        with needs("calibration on drawn scenes", "data"):
            from qkit_data.scenes import CALIBRATION
        start = 0 if held_out else CALIBRATION + 1000 * request.seed
        pairs, source = list(drawn(start, request.samples)), "drawn scenes"
    else:
        pairs, source = read_pairs(request.calib, request.samples), request.calib.name
    processor = load_processor(structure.checkpoint.path)
    return pair_rows(pairs, processor, image_tokens(structure.model.config), source)


def trajectory_rows(request: Request, structure: ModelStructure) -> Calibration:
    """Rows of a diffusion transformer, made while the run begins. Raises UsageError for a transformer without its pipeline."""
    with needs("sampling a diffusion pipeline", "diffusion"):
        import diffusers

    folder = find_model(request.model)
    if not is_pipeline(folder):
        raise UsageError(
            f"{folder}: a transformer without its pipeline cannot be sampled, and this method or scheme is measured on "
            "samples: give the pipeline's folder, or take another (--method rtn with w8a8, w4a8 or a weight-only scheme)"
        )
    sampling = sampling_of(folder, request.calib, request.call)
    made = getattr(diffusers, check_pipeline(folder)["_class_name"], None)
    if made is not None:
        check_call(made, sampling.call)  # before a job is begun
    cap = request.rows_memory or available_memory() or 1 << 40
    trajectory = Trajectory(
        folder=folder,
        sampling=sampling,
        samples=request.samples,
        seed=request.seed,
        dtype=run_dtype(structure.dtype),
        cap=cap,
    )
    source = f"{request.calib.name if request.calib else 'own'} prompts"
    return Calibration(
        source=source,
        samples=request.samples,
        seqlen=0,
        digest=trajectory.digest,
        tokens=torch.empty(request.samples, 0, dtype=torch.int64),
        trajectory=trajectory,
    )


def text_rows(request: Request, structure: ModelStructure) -> Calibration:
    """The calibration rows of a request. Raises UsageError for rows that are longer than the model's positions."""
    path = request.calib or embedded_text("calibration")
    kind = kind_of(structure.checkpoint.config)
    if kind in BY_BATCH:
        raise Unsupported(
            f"{structure.checkpoint.path}: a {kind} calls its blocks with positions of a whole batch, and qkit runs rows "
            "through blocks by themselves: use --method rtn without --calib"
        )
    config: Any = structure.text_config
    limit = getattr(config, "max_position_embeddings", None)
    if limit and request.seqlen > limit:
        raise UsageError(f"--seqlen {request.seqlen}: this model has positions for {limit} tokens: use a shorter one")
    source = path.name if request.calib else "embedded calibration text"
    tokenizer = load_tokenizer(structure.checkpoint.path)
    return calibration_rows(path, tokenizer, request.samples, request.seqlen, config.vocab_size, source)


def _may_need_rows(recipe: Recipe) -> bool:
    transforms, _ = parse_method(recipe.method)
    pairs = [recipe.resolved(r) for r in (None, *recipe.rules)]
    probe = {
        str(i): LinearPlan(
            name=str(i), shape=(1, 1), scheme=s.name, weights=s.weights, activations=s.activations, solver=solver
        )
        for i, (s, solver, _) in enumerate(pairs)
    }
    return why_rows(probe, transforms, int(recipe.significant > 0)) is not None
