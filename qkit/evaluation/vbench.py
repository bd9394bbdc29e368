"""VBench scores (arXiv 2311.17982) of a pipeline: qkit makes videos under the names that VBench expects, and an installed
VBench scores them.

VBench pins libraries that are older than qkit's, so it keeps an interpreter of its own: qkit writes the videos, runs VBench
in that interpreter and reads the scores that it leaves. Its own prompts give five videos each, as its rules say; or those
of a pipeline are used, and scored by the dimensions that need no more than a prompt (VBench's ``custom_input``).
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qkit.diffusion.trajectory import Sampling, sampling_of
from qkit.errors import BadInput, Unsupported, UsageError, write_failure
from qkit.evaluation.metrics import bootstrap_ci
from qkit.evaluation.request import PREFIX
from qkit.evaluation.video import SEEDS, held_out, make_video
from qkit.files.checkpoint import Checkpoint
from qkit.files.folder import RECORD, load_json, weights_folder
from qkit.files.safefile import sha256_file, shown, write_atomic
from qkit.system.progress import NamedAdvance
from qkit.tensor.formats import did_you_mean

PER_PROMPT = 5  # videos of each of VBench's own prompts: its rule
INDEX = "videos.json"  # beside the videos: whose they are
LONGEST = 200  # bytes of a prompt in the name of a file
# Said to the interpreter of VBench: where it lies, and what it is to judge.
_FIND = "import importlib.util as u; s = u.find_spec('vbench'); print(s.submodule_search_locations[0] if s else '')"
_JUDGE = """
import json, sys, torch
from vbench import VBench
r = json.load(sys.stdin)
bench = VBench(torch.device(r["device"]), r["info"], r["out"])
bench.evaluate(r["videos"], "qkit", dimension_list=r["dimensions"], mode=r["mode"], **r["more"])
"""
_MORE = {"imaging_quality_preprocessing_mode": "longer"}  # the default of VBench's own command


@dataclass(frozen=True)
class VideoRequest:
    """A video to make: its name without ending, its prompt and its seed."""

    name: str
    prompt: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class VBenchRequest:
    """A request of VBench scores. python: VBench's interpreter; videos: of the pipeline's own prompts (0: VBench's prompts);
    limit: of VBench's prompts for a dimension, None for all; folder: where videos are kept, None for nowhere."""

    dimensions: Sequence[str]
    python: Path
    videos: int = 0
    limit: int | None = None
    folder: Path | None = None
    device: str = "cpu"


def evaluate_vbench(
    pipelines: Sequence[tuple[str, Path, Callable[[], Any]]], bench: VBenchRequest, progress: NamedAdvance | None = None
) -> list[dict[str, dict[str, Any]]]:
    """The VBench scores of each pipeline (name of a folder for its videos, source, loader), as ``harness.run_tasks`` gives
    figures: {"vbench:DIMENSION": {"metrics": {"score": {"value", "ci", "values"}}, "samples"}}; values in the order of
    names.

    All sample the same prompts with the first one's call. Raises UsageError, BadInput, Unsupported where VBench fails.
    """
    info, entries = find_vbench(bench.python)
    check_dimensions(bench.dimensions, entries)
    sampling = sampling_of(pipelines[0][1], None, {})
    video_requests = (
        own_prompts(sampling, bench.videos)
        if bench.videos
        else standard_prompts(bench.dimensions, entries, bench.limit)
    )
    mode = "custom_input" if bench.videos else "vbench_standard"
    scores = []
    with tempfile.TemporaryDirectory(prefix="qkit-videos-") as nowhere:
        for name, source, load in pipelines:
            folder = (bench.folder or Path(nowhere)) / name
            write_videos(load, source, video_requests, sampling.call, folder, progress)
            scores.append(score_videos(bench, info, folder, mode))
    for task, entry in scores[0].items():
        for baseline_scores in scores[1:]:
            if entry["names"] != baseline_scores[task]["names"]:
                raise Unsupported(
                    f"VBench judged other videos of the baseline than of the model for {task}: it could not read all"
                )
    for entry in (e for tasks in scores for e in tasks.values()):
        del entry["names"]
    return scores


def find_vbench(python: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The path of VBench_full_info.json and its entries, of the VBench that this interpreter has. Raises UsageError,
    BadInput."""
    try:
        search = subprocess.run([python, "-E", "-c", _FIND], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise UsageError(f"--vbench-python {python}: cannot be run: {e}") from e
    lines = search.stdout.splitlines()
    if search.returncode or not lines or not lines[-1]:
        raise UsageError(f"--vbench-python {python}: no VBench there: {python} -m pip install vbench")
    file = Path(lines[-1]) / "VBench_full_info.json"
    entries = load_json(file, "VBench's list of prompts", 1 << 26)
    sound = isinstance(entries, list) and all(
        isinstance(e, dict) and {"prompt_en", "dimension"} <= set(e) for e in entries
    )
    if not sound:
        raise BadInput(f"{file}: expected a list of prompts with dimensions: install VBench again")
    return file, entries


def check_dimensions(dimensions: Sequence[str], entries: Iterable[dict[str, Any]]) -> None:
    """Raises UsageError for a dimension that VBench does not have."""
    dimensions_known = sorted({d for e in entries for d in e["dimension"]})
    unknown = next((d for d in dimensions if d not in dimensions_known), None)
    if unknown is not None:
        raise UsageError(
            f"--tasks {PREFIX}{unknown}: VBench has no such dimension{did_you_mean(unknown, dimensions_known)}"
        )


def standard_prompts(
    dimensions: Sequence[str], entries: Iterable[dict[str, Any]], limit: int | None
) -> list[VideoRequest]:
    """The videos of VBench's own prompts for these dimensions: the first ``limit`` of each, PER_PROMPT videos of every one."""
    counts, prompts = Counter[str](), list[str]()
    for entry in entries:
        due = [d for d in dimensions if d in entry["dimension"] and (limit is None or counts[d] < limit)]
        counts.update(due)
        if due:
            prompts.append(str(entry["prompt_en"]))
    return [
        VideoRequest(f"{prompt}-{i}", prompt, SEEDS + PER_PROMPT * number + i)
        for number, prompt in enumerate(dict.fromkeys(prompts))
        for i in range(PER_PROMPT)
    ]


def own_prompts(sampling: Sampling, count: int) -> list[VideoRequest]:
    """The videos of a pipeline's own prompts, as ``video.held_out`` gives them."""
    counts, requests = Counter[str](), list[VideoRequest]()
    for i in range(count):
        prompt, seed = held_out(sampling, i)
        name = prompt.replace("/", " ").encode()[:LONGEST].decode(errors="ignore")
        requests.append(VideoRequest(f"{name}-{counts[name]}", prompt, seed))
        counts[name] += 1
    return requests


def write_videos(
    load: Callable[[], Any],
    source: Path,
    video_requests: Sequence[VideoRequest],
    call: dict[str, Any],
    folder: Path,
    progress: NamedAdvance | None,
) -> None:
    """Writes the videos as mp4 files to ``folder``; those that are there are not made again. load: gives the pipeline.

    Raises UsageError for a folder with videos of another model or call, IOFailure.
    """
    weights = weights_folder(source)
    record = weights / RECORD  # what is decided by step is there
    fingerprint = Checkpoint.open(weights, quantized=True).fingerprint()
    content = {
        "model": fingerprint,
        "record": sha256_file(record) if record.is_file() else None,
        "call": call,
        "videos": {w.name: [w.prompt, w.seed] for w in video_requests},
    }
    file = folder / INDEX
    if file.is_file():
        existing = load_json(file, "list of videos")
        if existing != json.loads(json.dumps(content)):
            raise UsageError(f"{folder}: it holds videos of another model, call or prompts: use another --videos-dir")
    elif folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder}: it holds files that qkit did not make: use another --videos-dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(file, (json.dumps(content, indent=1) + "\n").encode())
        pipeline = None
        for number, w in enumerate(video_requests):
            target = folder / f"{w.name}.mp4"
            if not target.is_file():
                pipeline = pipeline or load()
                part = folder / f".{w.seed}.part.mp4"
                part.write_bytes(mp4(make_video(pipeline, w.prompt, call, w.seed).frames))
                part.replace(target)
            if progress is not None:
                progress("videos", number + 1, len(video_requests))
    except OSError as e:
        raise write_failure(folder, e) from e


def mp4(frames: torch.Tensor, rate: int = 8) -> bytes:
    """The H.264 file of frames [n, height, width, 3] from 0 to 1, close to lossless. Raises Unsupported."""
    try:
        import imageio.v3

        imopen: Any = imageio.v3.imopen
        imopen("<bytes>", "w", extension=".mp4", plugin="FFMPEG").close()  # ffmpeg itself is looked for here
    except ImportError as e:
        raise Unsupported(f"writing videos needs imageio and ffmpeg ({e.msg}): pip install qkit[video]") from e
    data = (frames.clamp(0, 1) * 255).round().byte().numpy()
    encoded: bytes = imageio.v3.imwrite(
        "<bytes>", data, extension=".mp4", plugin="FFMPEG", fps=rate, codec="libx264", macro_block_size=2,
        ffmpeg_log_level="error", output_params=["-crf", "6", "-threads", "1"],
    )  # fmt: skip
    return encoded


def score_videos(bench: VBenchRequest, info: Path, videos: Path, mode: str) -> dict[str, dict[str, Any]]:
    """The VBench scores of the videos in a folder. Raises Unsupported where VBench fails."""
    scores = {}
    for dimension in bench.dimensions:  # one by one: a dimension whose model cannot be fetched takes no other with it
        with tempfile.TemporaryDirectory(prefix="qkit-vbench-") as work:
            job = {
                "device": bench.device, "info": str(info), "out": work, "videos": str(videos.resolve()), "mode": mode,
                "dimensions": [dimension], "more": _MORE,
            }  # fmt: skip
            run = subprocess.run(
                [bench.python, "-E", "-c", _JUDGE], input=json.dumps(job), capture_output=True, text=True, cwd=work
            )
            file = Path(work) / "qkit_eval_results.json"
            if run.returncode or not file.is_file():
                last = next((x for x in reversed(run.stderr.strip().splitlines()) if x.strip()), "no reason given")
                raise Unsupported(f"VBench could not judge {dimension}: {shown(last.strip())}")
            scores[f"{PREFIX}{dimension}"] = _figures(load_json(file, "VBench's result", 1 << 28), dimension)
    return scores


def _figures(result: Any, dimension: str) -> dict[str, Any]:
    """Of [score, [{"video_path", "video_results"}, ...]]; "names" of the videos in the order of the values, too."""
    try:
        score, videos = result[dimension]
        by_name = {Path(v["video_path"]).name: float(v["video_results"]) for v in videos}
        value = float(score)
    except (KeyError, TypeError, ValueError) as e:
        raise Unsupported(f"VBench's result for {dimension} has an unexpected form ({e!r}): use vbench 0.1.5") from e
    names = sorted(by_name)
    values = [by_name[name] for name in names]
    ci = bootstrap_ci(torch.tensor(values, dtype=torch.float64)).ends if values else None
    return {"metrics": {"score": {"value": value, "ci": ci, "values": values}}, "samples": len(values), "names": names}
