"""The functions of ``qkit``: one for each verb of the command line, with the options of the command as keywords.

Nothing heavy is imported before a function is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.errors import UsageError

if TYPE_CHECKING:
    import torch

    from qkit.sensitivity.profile import Profile
    from qkit.system.progress import Progress
    from qkit.verification.verify import Report
    from qkit.workflows.check import CheckReport
    from qkit.workflows.quantize import PreparedRequest
    from qkit.workflows.resolve import ResolvedRequest


@dataclass(frozen=True)
class PlanPreview:
    """What ``quantize`` would do. resolved: the request, and what has to be measured before it is decided (``resolved.first``);
    prepared: plan, exact bytes, memory and disk; None where a budget leaves the formats open until a profile is measured."""

    resolved: ResolvedRequest
    prepared: PreparedRequest | None


def quantize(
    model: str | Path,
    *,
    out: str | Path,
    scheme: str | None = None,
    method: str | None = None,
    calib: str | Path | Sequence[str | Path] | None = None,
    work: str | Path | None = None,
    overwrite: bool = False,
    keep_job: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Quantize a model into the folder ``out``, and prove the result. The same call goes on where a stopped one ended.

    model:     a folder, the name of a reference model, or a hub id
    scheme:    for instance 'w4a16', 'w8a8', 'nvfp4' (``qkit list schemes``)
    method:    for instance 'rtn', 'gptq', 'awq+gptq' (``qkit list methods``); default: what ``quality`` chooses, which is
               'fast', 'balanced' (the default) or 'best' (``qkit list quality``)
    calib:     texts, chats, image-text data or prompts to calibrate on, each as on the command line ('chat.jsonl:2'); default:
               the data that comes with qkit
    work:      the job folder; default: ``out`` with '.job' behind its name
    overwrite: replace a result of qkit in ``out``, once the new one is proven
    keep_job:  keep the parts in the job folder after success
    progress:  gets the phases of the run (``qkit.system.progress.Progress``); default: silent
    options:   those of the command line, with underscores: samples, seqlen, group_size, seed, threads, device, recipe, bits,
               size, memory, kv, outliers, ...; ``options={'sweeps': 4}`` are those of the method
    Gives the report of the proof. Raises UsageError, BadRecipe, BadCheckpoint, BadCalibration for bad input, Unsupported for
    what cannot be done, IOFailure, JobConflict, NumericFailure and VerifyFailure (``qkit.errors``).
    """
    from qkit.system.progress import Silent
    from qkit.workflows.places import check_places, check_result_there
    from qkit.workflows.quantize import prepare
    from qkit.workflows.quantize import quantize as run
    from qkit.workflows.resolve import look_ahead, measure_first

    target, job, listener = _out_folder(out), None if work is None else Path(work), progress or Silent()
    read = _read({"model": model, "scheme": scheme, "method": method, "calib": calib, **options}, target)
    check_places(read.request.model, target, job, overwrite)
    check_result_there(read, target, overwrite)
    resolved = measure_first(look_ahead(read), read, target, job, listener)
    prepared = prepare(resolved.request, resolved.rows)
    return run(resolved.request, target, listener, work=job, overwrite=overwrite, keep_job=keep_job, prepared=prepared)


def plan(
    model: str | Path,
    *,
    scheme: str | None = None,
    method: str | None = None,
    calib: str | Path | Sequence[str | Path] | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> PlanPreview:
    """What ``quantize`` would do with the same options, without reading a weight. Raises what it raises before it measures.

    out: where the result would go; beside it an existing profile is looked for, and its disk is checked
    """
    from qkit.engine.forecast import refuse_what_cannot_fit
    from qkit.workflows.quantize import prepare
    from qkit.workflows.resolve import look_ahead

    target = _out_folder(Path(model).name if out is None else out)
    read = _read({"model": model, "scheme": scheme, "method": method, "calib": calib, **options}, target)
    resolved = look_ahead(read).decided
    if resolved.open:
        return PlanPreview(resolved, None)
    prepared = prepare(resolved.request, resolved.rows)
    refuse_what_cannot_fit(prepared.forecast, target)
    return PlanPreview(resolved, prepared)


def profile(
    model: str | Path,
    *,
    out: str | Path,
    candidates: str,
    measures: Sequence[str] = ("weight", "output", "pqi", "kl"),
    rows: int | None = None,
    points: int = 8,
    method: str = "gptq",
    progress: Progress | None = None,
    **options: Any,
) -> Profile:
    """Measure what every layer costs in every candidate format, and keep it in the folder ``out``.

    candidates: formats, separated by commas: 'int2,int3,int4,int8', or any scheme
    measures:   what is measured of each, in the units that ``qkit profile --help`` names
    rows:       calibration rows that losses are measured on; default: 32, or all if there are fewer
    points:     of the path integral of 'pqi'
    options:    group_size, calib, samples, seqlen, padded, answers_only, seed, threads, as on the command line;
                embeddings='auto' and head='auto' include these
    """
    from qkit.planning.request import Request
    from qkit.system.progress import Silent
    from qkit.workflows.profile import ProfileRequest
    from qkit.workflows.profile import profile as run

    known = (
        "embeddings",
        "head",
        "group_size",
        "calib",
        "samples",
        "seqlen",
        "padded",
        "answers_only",
        "seed",
        "threads",
    )
    _refuse_unknown(options, known)
    base = Request(model=str(model), method=method, **options)
    request = ProfileRequest(base, candidates, tuple(measures), rows, points)
    return run(request, _out_folder(out), progress or Silent())


def verify(out: str | Path, *, job: str | Path | None = None, source: str | Path | None = None) -> Report:
    """Prove that the packed checkpoint in ``out`` holds what it should: ``report.ok``, or ``report.problems``.

    job: also compare every weight with that job folder. Raises BadCheckpoint where there is no such folder.
    source: the folder of the model that it was made from; where experts were left out, those that stay are compared with it
    """
    from qkit.verification.verify import verify as prove

    return prove(Path(out), None if job is None else Path(job), None if source is None else Path(source))


def evaluate(
    model: str | Path,
    *,
    baseline: str | Path | None = None,
    texts: Sequence[str | Path] | None = None,
    window: int = 512,
    windows: int = 200,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity of texts and accuracy on tasks of the packed model; a folder that qkit wrote is verified first.

    baseline: the original model: adds its perplexity, the change, the KL divergence and the share of equal top tokens
    texts:    files, 'NAME=FILE' or 'dataset:NAME[:config][:split][:column]'; default: the text that comes with qkit, unless
              there are tasks
    window, windows: tokens of a window, and windows of each text at most
    tasks:    of lm-eval or qkit; limit: samples of each at most
    Encoders, classifiers and models that read one text and write another are measured by what they give, under "rows".
    Gives a dictionary as ``qkit eval --json`` writes it: sizes in bytes, losses in nats per token. Raises VerifyFailure for a
    damaged folder, BadInput for texts that cannot be read.
    """
    from qkit.evaluation.measure import measure
    from qkit.evaluation.request import EvalRequest
    from qkit.files.embedded import embedded_text
    from qkit.files.locate import find_model
    from qkit.workflows.check import require_sound

    folder, original = find_model(str(model)), None if baseline is None else find_model(str(baseline))
    require_sound(folder)
    chosen = texts if texts is not None else ([] if tasks else [str(embedded_text("evaluation"))])
    request = EvalRequest(
        texts=list(chosen), window=window, windows=windows, tasks=list(tasks), limit=limit, dtype=dtype, device=device
    )
    return measure(folder, original, request, _callback(progress))


def check(
    out: str | Path,
    *,
    budget: str | Path,
    baseline: str | Path | None = None,
    texts: Sequence[str] = (),
    dtype: str = "float32",
    device: str = "cpu",
    progress: Progress | None = None,
) -> CheckReport:
    """Hold the model in ``out`` against a budget file: ``report.ok``, ``report.checks``, ``report.measured``.

    A folder that qkit wrote is verified first. If a limit is not kept, it is marked as rejected (qkit-rejected.json); a check
    that passes removes the mark. baseline: the original model; default: the one that ``out`` was made from, if it is found.
    """
    from qkit.evaluation.budget import load_budget
    from qkit.files.locate import find_model
    from qkit.workflows.check import baseline_of, check_model, check_request, mark, require_sound

    file, folder = Path(budget), find_model(str(out))
    limits = load_budget(file)
    require_sound(folder)
    original = baseline_of(folder, None if baseline is None else str(baseline), limits, file)
    report = check_model(
        folder, original, limits, check_request(limits, file, texts, dtype, device), _callback(progress)
    )
    mark(folder, file, report.measured, report.checks, lambda sentence: None)
    return report


def load(path: str | Path, dtype: torch.dtype | None = None, device: str = "cpu", kv: str | None = None) -> Any:
    """A transformers language model in eval mode, or a diffusers pipeline; quantized linears stay packed in memory.

    path:   a folder that ``qkit quantize`` wrote, any compressed-tensors or full-precision checkpoint of a known kind,
            or the name of a reference model
    dtype:  of activations and unquantized weights; default: the checkpoint's. float32 computes on exactly the
            decompressed weights.
    device: where the model goes, as torch names it
    kv:     the KV cache that ``generate`` uses, for instance 'kivi2' or 'int8' ('none': a plain one); default: what the
            folder was made for, if it was
    Raises BadCheckpoint for a damaged folder, Unsupported for formats that qkit cannot run, UsageError for a policy that
    does not suit the model (``qkit.errors``).
    """
    from qkit.runtime import loading

    return loading.load(path, dtype, device, kv)


def _out_folder(path: str | Path) -> Path:
    folder = Path(path)
    if not folder.name:
        raise UsageError(f"out {path}: that is no name of a folder: use another")
    return folder


def _read(values: Mapping[str, Any], out: Path) -> Any:
    """The options of the command line from keywords. Raises UsageError for a keyword that there is not."""
    from qkit.files.locate import find_model
    from qkit.workflows.options import DEFAULTS, read_options

    _refuse_unknown(values, ("model", *DEFAULTS))
    found = {**DEFAULTS, **values, "model": str(values["model"])}
    for name in ("recipe", "profile"):
        found[name] = None if found[name] is None else Path(found[name])
    read = read_options(found, out)
    find_model(read.request.model)
    return read


def _refuse_unknown(values: Mapping[str, Any], known: Sequence[str]) -> None:
    from qkit.tensor.formats import did_you_mean

    for name in values:
        if name not in known:
            raise UsageError(f"unknown option '{name}'{did_you_mean(name, list(known))}")


def _callback(progress: Progress | None) -> Callable[[str, int, int], None] | None:
    """A listener to measurements: (what, done, in all) as phases and steps."""
    if progress is None:
        return None
    steps: dict[str, int] = {}

    def listen(what: str, done: int, total: int) -> None:
        if what not in steps:
            progress.start(what, total)
        progress.step(done - steps.get(what, 0))
        steps[what] = done

    return listen
