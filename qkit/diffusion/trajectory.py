"""Calibration along the trajectory: calls of a transformer while its pipeline samples.

The pipeline's own sampler runs in full precision, prompt by prompt. For every prompt some steps are kept, one from each of
STRATA equal parts of the schedule; the next prompt uses another step of each part, so all timesteps occur. All guidance
branches of a kept step are recorded. Prompts and steps a row: our choice (ViDiT-Q,
arXiv 2406.02540, takes 10 prompts and every tenth step).
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkit.calibration.block_calls import mapped
from qkit.diffusion.clock import Clock
from qkit.diffusion.pipeline import SAMPLING, load_pipeline, own_steps, quiet, reason
from qkit.errors import BadCalibration, UsageError
from qkit.files.folder import DENOISER, checked_path, load_json
from qkit.files.offload import OffloadedTensors
from qkit.files.safefile import shown
from qkit.files.text_file import TextFile
from qkit.tensor.formats import did_you_mean

STRATA = 8
_OWN = ("prompt", "class_labels", "generator", "output_type", "callback_on_step_end", "return_dict")


@dataclass(frozen=True)
class Sampling:
    """Arguments of a pipeline: prompts (or classes), and keyword arguments such as num_inference_steps."""

    prompts: tuple[str, ...]
    call: dict[str, Any]


def sampling_of(folder: Path, prompts: Path | None, call: dict[str, Any]) -> Sampling:
    """The user's prompts and arguments, or those of the folder's sampling.json. prompts: a text file, one prompt a line.

    Raises BadCalibration for a file without prompts, UsageError for arguments that qkit sets itself.
    """
    stored: Any = (
        load_json(checked_path(folder.resolve(), SAMPLING), "sampling") if (folder / SAMPLING).is_file() else {}
    )
    settings: dict[str, Any] = stored if isinstance(stored, dict) else {"call": None}
    listed = settings.get("prompts", [])
    if (
        not isinstance(settings.get("call", {}), dict)
        or not isinstance(listed, list)
        or not all(map(_is_prompt, listed))
    ):
        raise BadCalibration(
            f"{folder / SAMPLING}: expected an object with 'call', an object, and 'prompts', a list of texts"
        )
    reserved = next((name for name in (*settings.get("call", {}), *call) if name in _OWN), None)
    if reserved is not None:
        raise UsageError(f"--call {reserved}: qkit gives this argument itself: leave it out")
    texts = [str(p) for p in stored.get("prompts", ())]
    if prompts is not None:
        text, _ = TextFile(prompts, "prompts", BadCalibration).text()
        texts = [line.strip() for line in text.splitlines() if line.strip()]
        if not texts:
            raise BadCalibration(f"{prompts}: no prompt in it, expected one a line")
    if not texts:
        raise UsageError(f"{folder} comes without prompts: add --calib FILE, a text file with one prompt per line")
    return Sampling(tuple(texts), {**stored.get("call", {}), **call})


def _is_prompt(value: Any) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool)


def chosen_steps(count: int, prompt: int, most: int) -> tuple[int, ...]:
    """Kept steps, at most ``most``, of a schedule of ``count`` steps for prompt number ``prompt``."""
    parts = min(STRATA, count, most)
    edges = [count * i // parts for i in range(parts + 1)]
    return tuple(a + prompt % (b - a) for a, b in pairwise(edges))


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Calls of a pipeline's transformer, which are computed each time they are read; they are the same every time.

    samples: number of (prompt, step) pairs; each gives one row for each guidance branch
    cap: largest number of bytes of one row in memory; the others are offloaded to the disk
    component: of the pipeline, whose calls are recorded
    """

    folder: Path
    sampling: Sampling
    samples: int
    seed: int
    dtype: torch.dtype
    cap: int = 1 << 30
    component: str = DENOISER

    @property
    def digest(self) -> str:
        """sha256 of all settings of the calls; the pipeline itself is not included."""
        content = [self.sampling.prompts, self.sampling.call, self.samples, self.seed, STRATA]
        content += [] if self.component == DENOISER else [self.component]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def calls(self, folder: Path) -> Iterator[dict[str, Any]]:
        """Keyword arguments of the transformer, call after call, read from a temporary file in ``folder``.

        Raises BadCalibration for a call that takes more memory than the cap, and as ``sample`` does.
        """
        pipeline = load_pipeline(self.folder, self.dtype, "cpu", self.component)
        pipeline.set_progress_bar_config(disable=True)
        remaining, number = self.samples, 0
        while remaining > 0:
            prompt = self.sampling.prompts[number % len(self.sampling.prompts)]
            recorder = _CallRecorder(prompt=number, most=remaining, file=OffloadedTensors(folder), cap=self.cap)
            sample(pipeline, prompt, self.sampling.call, self.seed + number, recorder, self.component)
            if not recorder.kept:
                raise BadCalibration(
                    f"{self.folder}: the pipeline did not call its {self.component} with {self.sampling.call}"
                )
            yield from (recorder.read(call) for step in sorted(recorder.kept) for call in recorder.kept[step])
            remaining, number = remaining - len(recorder.kept), number + 1


@dataclass(kw_only=True)
class _CallRecorder:
    """Records the calls of one prompt's run at chosen steps. kept: {step: calls}, with tensors offloaded to ``file``."""

    prompt: int
    most: int
    file: OffloadedTensors
    cap: int
    kept: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    steps: tuple[int, ...] = ()

    def add(self, step: int, count: int, call: dict[str, Any]) -> None:
        self.steps = self.steps or chosen_steps(count, self.prompt, self.most)
        if step not in self.steps:
            return
        sizes: list[int] = []
        mapped(lambda v: sizes.append(v.nbytes) if isinstance(v, Tensor) else None, call)
        size = sum(sizes)
        if size > self.cap:
            raise BadCalibration(
                f"one call of the transformer takes {size / 1e6:.3f} MB, and rows may take {self.cap / 1e6:.3f} MB of memory "
                "(--rows-memory): allow more, or sample smaller images (--call)"
            )
        self.kept.setdefault(step, []).append(mapped(self._put, call))

    def _put(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        self.file.append(value)
        return _TensorIndex(len(self.file) - 1)

    def read(self, call: dict[str, Any]) -> dict[str, Any]:
        """A recorded call with its tensors loaded."""
        loaded_call: dict[str, Any] = mapped(lambda v: self.file[v.index] if isinstance(v, _TensorIndex) else v, call)
        return loaded_call


@dataclass(frozen=True)
class _TensorIndex:
    """The index of a tensor in the file."""

    index: int


def subject(pipeline: Any, prompt: str) -> dict[str, Any]:
    """The argument with the prompt, or with a class number for a pipeline that has only classes."""
    takes = "prompt" in inspect.signature(pipeline.__call__).parameters
    return {"prompt": prompt} if takes else {"class_labels": [int(prompt)]}


def check_call(pipeline_class: type, call: Iterable[str]) -> Mapping[str, Any]:
    """The parameters of a pipeline's class. Raises UsageError for arguments that it does not take."""
    parameters = inspect.signature(pipeline_class.__call__).parameters
    wrong = next((name for name in call if name not in parameters), None)
    if wrong is not None:
        raise UsageError(
            f"--call {wrong}: {pipeline_class.__name__} takes no such argument{did_you_mean(wrong, list(parameters))}"
        )
    return parameters


def sample(
    pipeline: Any,
    prompt: str,
    call: dict[str, Any],
    seed: int,
    recorder: _CallRecorder | None = None,
    component: str = DENOISER,
) -> Tensor:
    """Final latents (or images, where a pipeline gives no latents) of the pipeline's own sampler for one prompt, float32.

    recorder: records calls of a component. Raises BadCalibration for arguments that the pipeline does not accept, and for a
    scheduler that changes the number of steps while it runs, so that steps cannot be identified.
    """
    model = getattr(pipeline, component)
    signature = inspect.signature(model.forward)
    clock, counts = Clock(), set[int]()

    def look(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = dict(signature.bind(*args, **kwargs).arguments)
        arguments.pop("return_dict", None)
        clock.tick(arguments["timestep"], arguments["sample" if "sample" in arguments else "hidden_states"])
        count = own_steps(pipeline, component)
        counts.add(count)
        if len(counts) > 1 or clock.step >= count:
            raise BadCalibration(
                f"the scheduler {type(pipeline.scheduler).__name__} changed its steps in mid-run ({clock.step + 1} so far, of "
                f"{' then '.join(map(str, sorted(counts)))}): use one with a fixed schedule"
            )
        if recorder is not None:
            recorder.add(clock.step, count, {k: v for k, v in arguments.items() if v is not None})

    parameters = check_call(type(pipeline), call)
    output = "np" if "class_labels" in parameters else "latent"
    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.inference_mode(), quiet():
            result = pipeline(
                **subject(pipeline, prompt), **call, generator=torch.Generator().manual_seed(seed), output_type=output
            )
    except (ValueError, TypeError, RuntimeError, LookupError, AttributeError) as e:
        raise BadCalibration(f"the pipeline cannot sample {shown(prompt)} with {call}: {reason(e)}") from e
    finally:
        handle.remove()
    return torch.as_tensor(result.frames if hasattr(result, "frames") else result.images).float()
