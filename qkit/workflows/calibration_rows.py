"""The calibration rows that follow from a request."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch

from qkit.calibration.dataset import Calibration
from qkit.calibration.image_text import (
    drawn_scenes,
    image_text_rows,
    image_tokens,
    is_image_text,
    load_processor,
    read_image_text,
)
from qkit.calibration.mixture import Layout, embedded_rows, mixed_rows, no_rows
from qkit.calibration.sources import CalibSource
from qkit.diffusion.pipeline import check_pipeline, pipeline_around
from qkit.diffusion.trajectory import Trajectory, check_call, sampling_of
from qkit.errors import Unsupported, UsageError
from qkit.families.discover import kind_of
from qkit.families.structure import ModelStructure
from qkit.files.embedded import embedded_chats, embedded_text
from qkit.files.folder import DENOISER, is_pipeline
from qkit.files.locate import find_model
from qkit.planning.linear_plan import LinearPlan
from qkit.planning.plan import is_static, rows_reason
from qkit.planning.recipe import Recipe, parse_method
from qkit.planning.request import Request, check_rows
from qkit.runtime.loading import load_tokenizer
from qkit.system.extras import needs
from qkit.system.machine import available_memory, run_dtype

_CHARACTERS = 0x110000  # of Unicode


def calibration_asked(
    request: Request, structure: ModelStructure, recipe: Recipe, rows: Calibration | None = None
) -> Calibration | None:
    """The rows of the request, made or at hand, before the plan tells whether it needs them (it drops them if not)."""
    measured = is_static(request.kv) or recipe.prune_experts > 0
    asked = _may_need_rows(recipe) or measured or request.calib is not None
    check_rows(request, least=int(asked))
    if structure.family.encodes or not asked:
        return None  # what a text encoder would need rows for is refused
    return rows or calibration_of(request, structure)


def calibration_of(request: Request, structure: ModelStructure) -> Calibration:
    """The rows of a request: image-text data, rows of a text, or calls along a trajectory."""
    check_rows(request)
    _refuse_missing_data(request)
    is_text = structure.family.streams is None and not wants_image_text(request, structure)
    if not is_text and (request.padded or request.answers_only):
        raise UsageError(
            f"--{'padded' if request.padded else 'answers-only'} is for texts and chats, and this model is calibrated on more: "
            "leave it out"
        )
    if request.written and not is_text:
        raise UsageError(
            f"--synthetic-samples {request.synthetic_samples}: synthetic samples are text, and a "
            f"{kind_of(structure.checkpoint.config)} is calibrated on more than text: leave it out"
        )
    if is_text:
        return replace(text_rows(request, structure), written=request.written)
    return trajectory_rows(request, structure) if structure.family.streams else requested_image_text(request, structure)


def _refuse_missing_data(request: Request) -> None:
    """Raises UsageError where a recipe was made with data of a user that is not named: other data would give other weights."""
    if request.recorded is None or request.calib is not None or request.samples == 0:
        return
    if files := request.recorded.calibration.files:
        named = " ".join(f"--calib {source.words}" for source in files)
        raise UsageError(
            f"{request.recipe}: it was calibrated on {request.recorded.calibration.named}, and no data is in a recipe: add "
            f"{named} with the path of the file, or other data of yours"
        )


def wants_image_text(request: Request, structure: ModelStructure) -> bool:
    """Whether rows have images: those of a vision-language model do, unless the user gives texts or chats."""
    sources = request.sources
    with_images = [s for s in sources if is_image_text(s, bool(structure.family.text_types))]
    if structure.family.text_types:
        if with_images and len(sources) > 1:
            request.only_source("image-text data")
        return not sources or bool(with_images)
    if with_images:
        raise UsageError(
            f"--calib {with_images[0].name}: image-text data is for a vision-language model, and this is a "
            f"{kind_of(structure.checkpoint.config)}: use texts or chats"
        )
    return False


def requested_image_text(request: Request, structure: ModelStructure, held_out: bool = False) -> Calibration:
    """Rows of images, questions and answers: the user's, or drawn scenes; held_out: scenes that calibration does not use."""
    path = request.only_source("image-text data")
    if path is None:
        with needs("calibration on drawn scenes", "data"):
            from qkit_data.scenes import CALIBRATION
        start = 0 if held_out else CALIBRATION + 1000 * request.seed
        image_text, source = list(drawn_scenes(start, request.samples)), "drawn scenes"
    else:
        image_text, source = read_image_text(path, request.samples), path.name
    processor = load_processor(structure.checkpoint.path)
    return image_text_rows(image_text, processor, image_tokens(structure.model.config), source)


def trajectory_rows(request: Request, structure: ModelStructure) -> Calibration:
    """Rows of a diffusion transformer, made while the run begins. Raises UsageError for a transformer without its pipeline."""
    with needs("sampling a diffusion pipeline", "diffusion"):
        import diffusers

    folder = find_model(request.model)
    folder, component = (folder, DENOISER) if is_pipeline(folder) else pipeline_around(folder) or (folder, "")
    if not component:
        raise UsageError(
            f"{folder}: a transformer without its pipeline cannot be sampled, and this method or scheme needs "
            "samples: use the pipeline's folder, or another method (--method rtn with w8a8, w4a8 or a weight-only scheme)"
        )
    prompts = request.only_source("prompts")
    sampling = sampling_of(folder, prompts, request.call)
    pipeline_class = getattr(diffusers, check_pipeline(folder, component)["_class_name"], None)
    if pipeline_class is not None:
        check_call(pipeline_class, sampling.call)  # before a job is begun
    cap = request.rows_memory or available_memory() or 1 << 40
    trajectory = Trajectory(
        folder=folder,
        sampling=sampling,
        samples=request.samples,
        seed=request.seed,
        dtype=run_dtype(structure.dtype),
        cap=cap,
        component=component,
    )
    source = f"{prompts.name if prompts else 'own'} prompts"
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
    config: Any = structure.text_config
    limit = getattr(config, "max_position_embeddings", None)
    if limit and limit > 0 and request.seqlen > limit:
        raise UsageError(
            f"--seqlen {request.seqlen}: this model has positions for {limit} tokens: use a smaller number"
        )
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None and _reads_characters(structure.model):
        vocabulary = _CHARACTERS
    if vocabulary is None:
        reads = getattr(structure.model, "main_input_name", "input_ids")
        found = "config.json counts none" if reads == "input_ids" else f"this model reads {reads}"
        raise Unsupported(
            f"{structure.checkpoint.path}: calibration needs a vocabulary of tokens, and {found}: "
            "use a method without calibration (rtn with a weight-only scheme)"
        )
    if request.padded and not structure.is_causal:
        raise UsageError(
            f"--padded: a {type(structure.model).__name__} reads its samples in both directions, so that padding would change "
            "what other tokens read: leave it out"
        )
    layout = Layout(
        samples=request.samples, seqlen=request.seqlen, padded=request.padded, answers_only=request.answers_only
    )
    if request.samples == 0:
        return no_rows(layout)
    tokenizer = load_tokenizer(structure.checkpoint.path)
    if request.sources:
        return mixed_rows(request.sources, tokenizer, layout, vocabulary)
    text, chats = CalibSource(str(embedded_text("calibration"))), CalibSource(str(embedded_chats()))
    return embedded_rows(text, chats, tokenizer, layout, vocabulary)


def _reads_characters(model: Any) -> bool:
    """Whether a model without a vocabulary reads tokens: any number is a character for it, which it hashes."""
    return "input_ids" in inspect.signature(getattr(model, "base_model", model).forward).parameters


def _may_need_rows(recipe: Recipe) -> bool:
    transforms, _ = parse_method(recipe.method)
    resolved = [recipe.resolve(r) for r in (None, *recipe.rules)]
    probe = {
        str(i): LinearPlan(
            name=str(i), shape=(1, 1), scheme=s.name, weights=s.weights, activations=s.activations, solver=solver
        )
        for i, (s, solver, _) in enumerate(resolved)
    }
    return rows_reason(probe, transforms, int(recipe.significant > 0)) is not None
