"""The whole job as library calls: what ``qkit plan`` and ``qkit quantize`` run.

from qkit.pipeline import Request, prepare, quantize
report = quantize(Request(model="tiny-llama", scheme="w4a16", method="gptq"), out=Path("out"))
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from qkit.calibration import Calibration, calibration_rows
from qkit.checkpoint import Checkpoint, check_config, check_output_dir, check_tied, commit_dir
from qkit.diffusion.pipeline import check_pipeline, fingerprint_of
from qkit.diffusion.trajectory import Trajectory, check_call, sampling_of
from qkit.errors import Unsupported, UsageError, VerifyFailure
from qkit.export.folder import export, is_export_of
from qkit.families.discover import kind_of
from qkit.families.encoder import ENCODERS
from qkit.families.outline import Outline
from qkit.folder import is_pipeline, weights_folder
from qkit.forecast import Forecast, forecast, refuse_what_cannot_fit
from qkit.formats import did_you_mean
from qkit.job import Job
from qkit.kvscales import measure_scales
from qkit.loading import load_tokenizer
from qkit.locate import find_model, record_source
from qkit.machine import available_cores, available_memory, run_dtype
from qkit.pairs import drawn, image_tokens, is_dataset, load_processor, pair_rows, read_pairs
from qkit.parallel import workers
from qkit.plan import Plan, is_static, make_plan, why_rows
from qkit.recipe import Recipe, load_recipe, make_recipe, parse_method
from qkit.run import Progress, run_blocks
from qkit.sensitivity.forecast import repair_memory
from qkit.sensitivity.repair import repair
from qkit.steps import decide_steps
from qkit.towers import SKIP
from qkit.transforms.table import EFFORTS, TRANSFORMS
from qkit.verify import Report, verify


@dataclass(frozen=True)
class Request:
    """What ``qkit quantize`` is asked for.

    calib: a text file; None: the embedded calibration text. samples x seqlen tokens of it are used where the method
    needs any. recipe: a YAML file; scheme, method, group_size and options given here go over it. rules: as in a
    recipe, what an allocation decided. effort: a name of EFFORTS, options of learned rounding. outliers, significant,
    targets: as in a recipe; None: what the recipe says. call: of a diffusion pipeline, what it is called with while
    it is calibrated; its calib are prompts, one a line, and rows_memory the bytes that rows may take in memory;
    policy: as in a recipe. kv: the KV cache policy that the result is to be run with, as ``Policy.to_json`` gives it;
    key_exponents: as in a plan.
    """

    model: str
    scheme: str | None = None
    method: str | None = None
    group_size: int | None = None
    recipe: Path | None = None
    rules: tuple[dict[str, Any], ...] = ()
    outliers: float | dict[str, float] | None = None
    significant: float | None = None
    targets: dict[str, str] | None = None
    effort: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    rows_memory: int | None = None
    strict: bool = False
    export: str | None = None
    calib: Path | None = None
    samples: int = 128
    seqlen: int = 256
    seed: int = 0
    threads: int | None = None
    kv: dict[str, Any] | None = None
    key_exponents: tuple[tuple[tuple[int, ...], ...], ...] | None = None


COMPONENTS = "components"  # of a job folder: text encoders that are quantized beside the transformer


@dataclass(frozen=True)
class Prepared:
    """A plan with everything it was made from."""

    plan: Plan
    outline: Outline
    forecast: Forecast
    components: dict[str, Request] = field(
        default_factory=dict
    )  # of a diffusion pipeline, those that are quantized too


def open_outline(model: str, language_for: str = "") -> Outline:
    """Open and check a full-precision checkpoint. language_for: what it is opened for, if that is for language models only;
    raises Unsupported for others then."""
    folder = find_model(model)
    if is_pipeline(folder):
        check_pipeline(folder)
    checkpoint = Checkpoint.open(weights_folder(folder))
    check_config(checkpoint.config, checkpoint.tensors)
    outline = Outline(checkpoint)
    if outline.family.streams is not None and language_for:
        raise Unsupported(
            f"{folder}: {language_for} is for language models, and this is a {kind_of(checkpoint.config)}"
        )
    if outline.family.streams is None:
        check_tied(checkpoint, bool(outline.tied))
    return outline


def prepare(request: Request, rows: Calibration | None = None) -> Prepared:
    """Plan a request; reads no weights. rows: those of the request, where they were made before."""
    recipe = recipe_of(request)
    outline = open_outline(request.model)
    if request.call and outline.family.streams is None:
        raise UsageError("--call is what a diffusion pipeline is called with, and this model is none: leave it out")
    calibration = calibration_asked(request, outline, recipe, rows)
    plan = make_plan(recipe, outline, calibration, request.seed, request.kv)
    _check_pictures(plan, outline)
    folder = find_model(request.model)
    around = fingerprint_of(folder) if is_pipeline(folder) else None
    components = _components(folder, recipe, request, outline)
    plan = replace(plan, key_exponents=request.key_exponents, pipeline=around)
    threads = request.threads or available_cores()
    after = {"significant weights": repair_memory(plan, outline, threads)} if plan.significant else {}
    return Prepared(plan, outline, forecast(plan, outline, threads, after), components)


def _components(folder: Path, recipe: Recipe, request: Request, outline: Outline) -> dict[str, Request]:
    """Requests for the text encoders of a pipeline that the recipe has a scheme for: --target text_encoder=w8a16.

    Raises UsageError for targets that are no text encoders of it.
    """
    if outline.family.streams is None:
        return {}
    index = check_pipeline(folder) if is_pipeline(folder) else {}
    there = [k for k, v in index.items() if isinstance(v, list) and v[1] in ENCODERS]
    unknown = next((t for t in recipe.targets if t not in there), None)
    if unknown is not None:
        expected = f"expected one of {', '.join(there)}" if there else f"it has no {' or '.join(ENCODERS)}"
        raise UsageError(
            f"{folder}: no text encoder {unknown!r} for --target, {expected}{did_you_mean(unknown, there)}"
        )
    found = {}
    for name, given in recipe.targets.items():
        if given != SKIP:
            found[name] = Request(str(folder / name), scheme=given, threads=request.threads, strict=request.strict)
            prepare(found[name])
    return found


def _check_pictures(plan: Plan, outline: Outline) -> None:
    """Raises UsageError where a tower is to be calibrated with rows that have no picture."""
    if plan.calibration is None or plan.calibration.kinds is not None:
        return
    for tower in outline.towers:
        mine = {x.name: plan.linears[x.name] for b in tower.blocks for x in b.linears if x.name in plan.linears}
        rows = why_rows(mine, plan.transforms, 0) if mine else None
        if rows:
            raise UsageError(
                f"the {tower.name} is to be quantized, {rows}, and --calib is a text without pictures: give a .jsonl file or a "
                f"folder, leave --calib out, or give --target {tower.name}=skip"
            )


def recipe_of(request: Request) -> Recipe:
    given = {
        "scheme": request.scheme,
        "method": request.method,
        "group_size": request.group_size,
        "strict": request.strict or None,
        "export": request.export,
        "options": request.options or None,
        "rules": request.rules or None,
        "outliers": request.outliers,
        "significant": request.significant,
        "targets": request.targets or None,
        "policy": request.policy or None,
    }
    over = {k: v for k, v in given.items() if v is not None}
    if request.recipe is None and request.scheme is None:
        raise UsageError(
            "no scheme: give --scheme (for instance w4a16) or --recipe FILE ('qkit list schemes' shows all)"
        )
    recipe = make_recipe(over, "command line") if request.recipe is None else load_recipe(request.recipe, over)
    if request.effort is None:
        return recipe
    if not any(TRANSFORMS[t].stage == "block" for t in parse_method(recipe.method)[0]):
        raise UsageError(
            f"--effort is what learned rounding takes, and method '{recipe.method}' has none: take signround, or "
            "SOLVER+signround, or leave --effort out"
        )
    return recipe.model_copy(update={"options": {**recipe.options, **EFFORTS[request.effort], **request.options}})


def calibration_asked(
    request: Request, outline: Outline, recipe: Recipe, rows: Calibration | None = None
) -> Calibration | None:
    """The rows of the request, made or at hand, whether or not the plan will turn out to need them (it drops them if not)."""
    _check_shape(request)
    if outline.family.encodes or not (_may_need_rows(recipe) or is_static(request.kv) or request.calib is not None):
        return None  # what a text encoder would need rows for is refused
    return rows or calibration_of(request, outline)


def calibration_of(request: Request, outline: Outline) -> Calibration:
    """The rows that a request says: pairs of pictures and answers, rows of a text, or calls along a trajectory."""
    _check_shape(request)
    if outline.family.streams is not None:
        return trajectory_rows(request, outline)
    return pair_calibration(request, outline) if wants_pairs(request, outline) else text_rows(request, outline)


def _check_shape(request: Request) -> None:
    if request.samples < 1 or request.seqlen < 2:
        raise UsageError(
            f"--samples {request.samples} --seqlen {request.seqlen}: expected at least 1 row of at least 2 tokens"
        )


def wants_pairs(request: Request, outline: Outline) -> bool:
    """Whether rows have pictures: those of a vision-language model do, unless the user gives a text."""
    given = request.calib
    pairs = given is not None and (given.is_dir() or given.suffix == ".jsonl" or is_dataset(given))
    if outline.family.text_types:
        return given is None or pairs
    if pairs:
        raise UsageError(
            f"--calib {given}: pairs of pictures and answers are for a vision-language model, and this is a "
            f"{kind_of(outline.checkpoint.config)}: give a text file"
        )
    return False


def pair_calibration(request: Request, outline: Outline, held_out: bool = False) -> Calibration:
    """Rows of pictures, questions and answers: the user's, or drawn scenes; held_out: scenes that calibration does not use."""
    from qkit_data.scenes import CALIBRATION

    start = 0 if held_out else CALIBRATION + 1000 * request.seed
    if request.calib is None:
        pairs, source = list(drawn(start, request.samples)), "drawn scenes"
    else:
        pairs, source = read_pairs(request.calib, request.samples), request.calib.name
    processor = load_processor(outline.checkpoint.path)
    return pair_rows(pairs, processor, image_tokens(outline.model.config), source)


def trajectory_rows(request: Request, outline: Outline) -> Calibration:
    """Rows of a diffusion transformer, made while the run begins. Raises UsageError for a transformer without its pipeline."""
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
    trajectory = Trajectory(folder, sampling, request.samples, request.seed, run_dtype(outline.dtype), cap)
    source = f"{request.calib.name if request.calib else 'own'} prompts"
    return Calibration(
        source,
        request.samples,
        0,
        trajectory.digest,
        torch.empty(request.samples, 0, dtype=torch.int64),
        trajectory=trajectory,
    )


def text_rows(request: Request, outline: Outline) -> Calibration:
    """The calibration rows of a request. Raises UsageError for rows that are longer than the model's positions."""
    path = request.calib or embedded_text()
    config: Any = outline.text_config
    limit = getattr(config, "max_position_embeddings", None)
    if limit and request.seqlen > limit:
        raise UsageError(f"--seqlen {request.seqlen}: this model has positions for {limit} tokens: use a shorter one")
    source = path.name if request.calib else "embedded calibration text"
    tokenizer = load_tokenizer(outline.checkpoint.path)
    return calibration_rows(path, tokenizer, request.samples, request.seqlen, config.vocab_size, source)


def embedded_text() -> Path:
    """The calibration text that comes with qkit."""
    import qkit_data

    return Path(str(qkit_data.text_path("calibration")))


def _may_need_rows(recipe: Recipe) -> bool:
    from qkit.plan import LinearPlan
    from qkit.recipe import parse_method

    transforms, _ = parse_method(recipe.method)
    pairs = [recipe.resolved(r) for r in (None, *recipe.rules)]
    probe = {
        str(i): LinearPlan(str(i), (1, 1), s.name, s.weights, s.activations, solver)
        for i, (s, solver, _) in enumerate(pairs)
    }
    return why_rows(probe, transforms, int(recipe.significant > 0)) is not None


def quantize(
    request: Request,
    out: Path,
    progress: Progress,
    *,
    work: Path | None = None,
    overwrite: bool = False,
    keep_job: bool = False,
    prepared: Prepared | None = None,
) -> Report:
    """Plan, run, export, verify. The same call goes on where a killed one stopped.

    work: the job folder (default: OUT.job, beside OUT). Raises the errors of every stage; VerifyFailure leaves
    OUT.partial for inspection and OUT untouched.
    """
    found = prepared or prepare(request)
    plan, outline, source = found.plan, found.outline, find_model(request.model)
    work = work or out.with_name(out.name + ".job")
    if is_export_of(out, plan):
        report = verify(out)
        if report.problems:
            first = report.problems[0]
            raise VerifyFailure(
                f"{out} is the result of this command and was damaged since, in {len(report.problems)} places, first "
                f"{first.where}: {first.what}: delete it, or move it away, and run the command again"
            )
        return report
    check_output_dir(out, source.resolve(), overwrite)
    if source.resolve() in (work.resolve(), *work.resolve().parents):
        raise UsageError(f"{work}: the job folder lies inside the model folder: choose another with --work")
    refuse_what_cannot_fit(found.forecast, out)
    partial = out.with_name(out.name + ".partial")
    with Job.open(work, plan.identity) as job, workers(request.threads) as pool:
        record_source(work, source)
        replaced = {name: work / COMPONENTS / name for name in found.components}
        for name, asked in found.components.items():
            quantize(asked, replaced[name], progress)
        run_blocks(plan, outline, job, pool, progress)
        repair(plan, outline, job, pool, progress)
        measure_scales(plan, outline, job, pool, progress)
        progress.start("export and verify", 2)
        export(plan, outline, job, partial, source, replaced=replaced)
        decide_steps(plan, outline, partial, progress)
        progress.step()
        report = verify(partial, work)
        progress.step()
        if report.problems:
            first = report.problems[0]
            raise VerifyFailure(
                f"{partial}: the export failed its own proof in {len(report.problems)} places, first {first.where}: "
                f"{first.what}: this is a fault of qkit; please report it with the job folder {work}"
            )
        commit_dir(partial, out, overwrite)
        if not keep_job:
            job.remove_bulk()
            shutil.rmtree(work / COMPONENTS, ignore_errors=True)
    return report


def coverage(plan: Plan) -> dict[str, Any]:
    """What is quantized and what is not, in numbers."""
    schemes: dict[str, int] = {}
    for p in plan.linears.values():
        schemes[p.scheme] = schemes.get(p.scheme, 0) + 1
    weights = sum(p.shape[0] * p.shape[1] for p in plan.linears.values())
    return {
        "quantized": len(plan.linears),
        "skipped": len(plan.skipped),
        "schemes": schemes,
        "weights": weights,
        "bytes_before": plan.source_bytes,
        "bytes_after": plan.packed_bytes,
    }


__all__ = ["Prepared", "Request", "coverage", "open_outline", "prepare", "quantize"]
