"""The whole job as library calls: what ``qkit plan`` and ``qkit quantize`` run.

from qkit.workflows.quantize import Request, prepare, quantize
report = quantize(Request(model="tiny-llama", scheme="w4a16", method="gptq"), out=Path("out"))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qkit.calibration.dataset import Calibration
from qkit.diffusion.pipeline import SECOND, check_pipeline, files_around
from qkit.diffusion.policy import BY_STEP
from qkit.engine.auto import forecast_of, plan_of
from qkit.engine.end_to_end import END_TO_END, end_to_end_disk, end_to_end_memory, end_to_end_tokens, learn_end_to_end
from qkit.engine.ends import quantize_ends
from qkit.engine.expert_pruning import pruning_memory, with_chosen_experts
from qkit.engine.export import export, is_export_of, job_identity, source_hashes
from qkit.engine.forecast import Forecast, refuse_what_cannot_fit
from qkit.engine.job import Job, clear
from qkit.engine.kv_scales import measure_scales
from qkit.engine.partial_output import Partial
from qkit.engine.proof import proof_memory, prove_rotation
from qkit.engine.run import run_blocks
from qkit.engine.synthetic_rows import SYNTHETIC, synthetic_memory, with_synthetic_rows
from qkit.errors import IOFailure, Unsupported, UsageError, VerifyFailure
from qkit.families.discover import kind_of
from qkit.families.encoder import ENCODERS
from qkit.families.pruned import PrunedStructure, whole_of, without_experts
from qkit.families.structure import ModelStructure
from qkit.files.card import edited_card
from qkit.files.checkpoint import Checkpoint, check_config, check_tied
from qkit.files.folder import DENOISER, is_pipeline, weights_folder
from qkit.files.job_folder import remove_job
from qkit.files.locate import find_model, record_source
from qkit.files.output import check_output_dir, commit_dir, remove_result
from qkit.planning.plan import Plan, on_device, rows_reason
from qkit.planning.recipe import Recipe
from qkit.planning.recipe_file import recipe_file, run_notes
from qkit.planning.request import Request, recipe_of
from qkit.planning.towers import SKIP
from qkit.sensitivity.forecast import PassForecast, gradient_passes, pass_operations, repair_memory
from qkit.sensitivity.repair import repair
from qkit.system.devices import find_device
from qkit.system.machine import available_cores
from qkit.system.memory import ran_out
from qkit.system.parallel import workers
from qkit.system.progress import Progress
from qkit.tensor.formats import did_you_mean
from qkit.verification.verify import Report, verify
from qkit.workflows.calibration_rows import calibration_asked
from qkit.workflows.diffusion_policy import decide_steps
from qkit.workflows.original_passes import original_passes
from qkit.workflows.places import check_places

LARGE = 1 << 30  # bytes of weights whose hash takes long enough to be a phase
COMPONENTS = "components"  # of a job folder: text encoders that are quantized beside the transformer


@dataclass(frozen=True)
class PreparedRequest:
    """A plan with everything it was made from."""

    plan: Plan
    structure: ModelStructure
    forecast: Forecast
    components: dict[str, Request] = field(
        default_factory=dict
    )  # of a diffusion pipeline, those that are quantized too
    notes: tuple[str, ...] = ()  # what differs from the run that wrote the recipe
    before: tuple[str, ...] = ()  # phases of the whole original model, before the blocks


def open_structure(model: str, language_for: str = "", adapter: str | None = None) -> ModelStructure:
    """Open and check a checkpoint. language_for: what it is opened for, if that is for language models only; raises
    Unsupported for others then. adapter: the folder of an adapter that is merged into it."""
    folder = find_model(model)
    if is_pipeline(folder):
        check_pipeline(folder)
    checkpoint = Checkpoint.open(weights_folder(folder), adapter=adapter)
    check_config(checkpoint.config, checkpoint.tensors)
    structure = ModelStructure(checkpoint)
    if language_for and not structure.is_language_model:
        kind = type(structure.model).__name__ if structure.is_discovered else kind_of(checkpoint.config)
        raise Unsupported(f"{folder}: {language_for} is for language models, and this is a {kind}")
    if structure.family.streams is None:
        check_tied(structure.checkpoint, structure.tied)
    return structure


def prepare(
    request: Request, rows: Calibration | None = None, structure: ModelStructure | None = None
) -> PreparedRequest:
    """Plan a request; reads no weights. rows, structure: those of the request, where they were made before."""
    device, recipe = find_device(request.device), recipe_of(request)
    structure = structure or open_structure(request.model, adapter=request.adapter)
    if request.call and structure.family.streams is None:
        raise UsageError("--call is for a diffusion pipeline, and this model is none: leave it out")
    if recipe.prune_experts:
        structure = without_experts(structure, recipe.prune_experts)
    _ = structure.checkpoint.side_files  # read and checked before anything is made of the tokenizer
    calibration = calibration_asked(request, structure, recipe, rows)
    plan = plan_of(recipe, structure, calibration, request.seed, request.kv)
    if request.written and (plan.calibration is None or not plan.needs_rows):
        raise UsageError(
            f"--synthetic-samples {request.synthetic_samples}: this method uses no calibration samples: use another --method "
            "(signround, gptq, ...), or leave it out"
        )
    if request.written and not structure.is_language_model:
        raise Unsupported(
            f"--synthetic-samples {request.synthetic_samples}: a {type(structure.model).__name__} does not continue a text: "
            "leave it out"
        )
    _check_pictures(plan, structure)
    folder = find_model(request.model)
    around = files_around(folder) if is_pipeline(folder) else None
    components = _components(folder, recipe, request, structure)
    plan = replace(plan, key_exponents=request.key_exponents, pipeline=around)
    plan = on_device(plan, device, structure.dtype)
    threads = request.threads or available_cores()
    after = {"significant weights": repair_memory(plan, structure, threads)} if plan.significant else {}
    passes = gradient_passes(plan, structure, threads)
    after |= {name: p.memory for name, p in passes.items()}
    if plan.learning("e2e_steps"):
        after[END_TO_END] = end_to_end_memory(plan, structure, threads)
    if plan.calibration is not None and plan.calibration.written:
        after[SYNTHETIC] = synthetic_memory(plan, whole_of(structure), threads)
    if isinstance(structure, PrunedStructure):
        after["scores of experts"] = pruning_memory(plan, structure)
    if "rotate" in plan.transforms:
        after["proof of the rotation"] = proof_memory(whole_of(structure))
    of_model = _operations_of_model(plan, structure, passes)
    notes = () if request.recorded is None else tuple(run_notes(request.recorded, plan))
    cost = forecast_of(plan, structure, threads, after)
    beside = max((p.disk for p in passes.values()), default=0)
    beside = max(beside, end_to_end_disk(plan, structure) if plan.learning("e2e_steps") else 0)
    cost = replace(cost, job_bytes=cost.job_bytes + beside, operations={**cost.operations, **of_model})
    before = (*((SYNTHETIC,) if SYNTHETIC in of_model else ()), *passes)
    return PreparedRequest(plan, structure, cost, components, notes, before)


def _operations_of_model(plan: Plan, structure: ModelStructure, passes: Mapping[str, PassForecast]) -> dict[str, float]:
    """Operations of what a run makes of the whole model before it comes to the blocks, and once they are done, by phase."""
    rows, operations = plan.calibration, {name: p.operations for name, p in passes.items()}
    if rows is not None and rows.written:
        operations[SYNTHETIC] = pass_operations(structure, rows.written * rows.seqlen)
    if plan.learning("e2e_steps"):
        operations[END_TO_END] = pass_operations(structure, end_to_end_tokens(plan))
    return operations


def _components(folder: Path, recipe: Recipe, request: Request, structure: ModelStructure) -> dict[str, Request]:
    """Requests for other components of a pipeline: its second transformer, as the first unless --target says otherwise, and
    text encoders that the recipe has a scheme for (--target text_encoder=w8a16).

    Raises UsageError for targets that are neither, Unsupported for a policy by step with two transformers.
    """
    if structure.family.streams is None:
        return {}
    index = check_pipeline(folder) if is_pipeline(folder) else {}
    encoders = [k for k, v in index.items() if isinstance(v, list) and v[1] in ENCODERS]
    second = [SECOND] if index.get(SECOND, [None, None]) != [None, None] else []
    unknown = next((t for t in recipe.targets if t not in (*encoders, *second)), None)
    if unknown is not None:
        known = [*encoders, *second]
        expected = f"expected one of {', '.join(known)}" if known else f"it has no {' or '.join(ENCODERS)}"
        raise UsageError(
            f"{folder}: no text encoder {unknown!r} for --target, {expected}{did_you_mean(unknown, known)}"
        )
    if second and (recipe.policy is not None or recipe.scheme.upper() == BY_STEP):
        raise Unsupported(
            f"{folder}: a policy by step is for one transformer, and this pipeline has two ({DENOISER}, {SECOND}): use another "
            "scheme, for instance nvfp4"
        )
    requests = {}
    for name in dict.fromkeys((*second, *recipe.targets)):
        given = recipe.targets.get(name)
        if given == SKIP:
            continue
        path = str(folder / name)
        if name == SECOND:
            requests[name] = replace(request, model=path, scheme=given or request.scheme, targets={})
        else:
            requests[name] = Request(
                model=path, scheme=given, threads=request.threads, device=request.device, strict=request.strict
            )
        prepare(requests[name])
    return requests


def _check_pictures(plan: Plan, structure: ModelStructure) -> None:
    """Raises UsageError where a tower is to be calibrated with rows that have no picture."""
    if plan.calibration is None or plan.calibration.kinds is not None:
        return
    for tower in (t for t in structure.towers if not t.on_text):
        mine = {x.name: plan.linears[x.name] for b in tower.blocks for x in b.linears if x.name in plan.linears}
        rows = rows_reason(mine, plan.transforms, 0) if mine else None
        if rows:
            raise UsageError(
                f"the {tower.name} is to be quantized, {rows}, and --calib is a text without images: use a .jsonl file or a "
                f"folder, leave --calib out, or add --target {tower.name}=skip"
            )


def quantize(
    request: Request,
    out: Path,
    progress: Progress,
    *,
    work: Path | None = None,
    overwrite: bool = False,
    keep_job: bool = False,
    prepared: PreparedRequest | None = None,
) -> Report:
    """Plan, run, export, verify. The same call goes on where a killed one stopped.

    work: the job folder (default: OUT.job, beside OUT). Raises the errors of every stage; VerifyFailure leaves
    OUT.partial for inspection and OUT untouched.
    """
    prepared_request = prepared or prepare(request)
    plan, structure, source = prepared_request.plan, prepared_request.structure, find_model(request.model)
    work = work or out.with_name(out.name + ".job")
    large = structure.checkpoint.nbytes > LARGE
    if large:
        progress.start("read the source", len(structure.checkpoint.shards))
    hashed = source_hashes(plan, structure, source, progress.step if large else lambda: None)
    if is_export_of(out, plan, hashed):
        report = verify(out)
        if report.ok:
            if not keep_job and clear(work, job_identity(plan, hashed)):
                _clear_components(work, prepared_request)
            return report
        first = report.problems[0]
        if not overwrite:
            raise VerifyFailure(
                f"{out} is the result of this command and was damaged since, in {len(report.problems)} places, first "
                f"{first.where}: {first.what}: add --overwrite to make it again"
            )
    if not overwrite and is_export_of(out, plan):
        raise UsageError(
            f"{out}: it is the result of this command for other weights, and those of {source} have changed since: choose "
            "another folder, or add --overwrite to make it again"
        )
    check_output_dir(out, source.resolve(), overwrite)
    check_places(request.model, out, work, overwrite)
    refuse_what_cannot_fit(prepared_request.forecast, out, work)
    if "rotate" in plan.transforms:
        prove_rotation(whole_of(structure), plan.seed)
    with (
        _told_of_memory(work, plan.device),
        Job.open(work, job_identity(plan, hashed)) as job,
        Partial.claim(out, work) as partial,
        workers(request.threads if plan.device == "cpu" else 1) as pool,  # a GPU has work enough from one
    ):
        check_output_dir(out, source.resolve(), overwrite)  # once more, now that no other command writes there
        record_source(work, source)
        replaced = {name: work / COMPONENTS / name for name in prepared_request.components}
        for name, asked in prepared_request.components.items():
            quantize(asked, replaced[name], progress)
        running = with_synthetic_rows(plan, whole_of(structure), job, pool, progress)
        structure = with_chosen_experts(running, structure, job, pool, progress)
        run_blocks(
            running, structure, job, pool, progress, original_passes(running, structure, job, pool, progress)
        )  # nothing else holds the results of the passes
        quantize_ends(running, structure, job, pool, progress)
        learn_end_to_end(running, structure, job, pool, progress)
        repair(running, structure, job, pool, progress)
        measure_scales(running, structure, job, pool, progress)
        progress.start("export and verify", 2)
        recipe = recipe_file(plan, request, structure, hashed)
        export(plan, structure, job, partial, source, hashed, recipe, replaced=replaced, edited=edited_card(out))
        decide_steps(plan, structure, partial.path, progress)
        progress.step()
        report = verify(partial.path, work, source)
        progress.step()
        if report.problems:
            first = report.problems[0]
            raise VerifyFailure(
                f"{partial.path}: the export failed its own verification in {len(report.problems)} places, first "
                f"{first.where}: {first.what}: this is a fault of qkit: please report it with the job folder {work}"
            )
        commit_dir(partial.path, out, overwrite)
        if not keep_job:
            job.remove_bulk()
            _clear_components(work, prepared_request)
    return report


def _clear_components(work: Path, prepared: PreparedRequest) -> None:
    """Remove the results in a job folder that a finished pipeline holds."""
    for folder in (work / COMPONENTS / name for name in prepared.components):
        if folder.is_dir():
            remove_result(folder)
        remove_job(folder.with_name(folder.name + ".job"))
    with suppress(OSError):  # where something else is in it, or it is not there
        (work / COMPONENTS).rmdir()


@contextmanager
def _told_of_memory(work: Path, device: str) -> Iterator[None]:
    """Raises IOFailure where memory runs out; what the job committed stays."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        if not ran_out(e):
            raise
        if device != "cpu":
            raise IOFailure(
                f"out of memory, on {device} or beside it; finished blocks are kept in {work}: close other programs there and "
                "run the same command again, or start anew with --device cpu"
            ) from e
        raise IOFailure(
            f"out of memory; finished blocks are kept in {work}: close other programs, then run the same command again, with "
            "fewer --threads if that is not enough"
        ) from e


def coverage(plan: Plan) -> dict[str, Any]:
    """What is quantized and what is not, in numbers."""
    schemes: dict[str, int] = {}
    for p in plan.packed.values():
        schemes[p.scheme] = schemes.get(p.scheme, 0) + 1
    weights = sum(p.shape[0] * p.shape[1] for p in plan.packed.values())
    return {
        "quantized": len(plan.packed),
        "skipped": len(plan.skipped),
        **({"kept": len(plan.kept)} if plan.kept else {}),
        "schemes": schemes,
        "weights": weights,
        "bytes_before": plan.source_bytes,
        "bytes_after": plan.packed_bytes,
    }


__all__ = ["PreparedRequest", "Request", "coverage", "open_structure", "prepare", "quantize"]
