"""Calibration along the trajectory: what a transformer is called with while its pipeline samples.

The pipeline's own sampler runs in full precision, prompt by prompt. Of every prompt some steps are kept, one from each of
STRATA equal parts of the schedule, and another one of a part for the next prompt, so that all timesteps have their
share; of a kept step, the calls of all guidance branches. Prompts and steps a row: our choice (ViDiT-Q,
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
from qkit.diffusion.pipeline import SAMPLING, load_pipeline, quiet, reason
from qkit.errors import BadCalibration, UsageError
from qkit.files.folder import DENOISER, contained, load_json
from qkit.files.offload import OffloadedTensors
from qkit.files.safefile import shown
from qkit.files.text_file import TextFile
from qkit.tensor.formats import did_you_mean

STRATA = 8
_OWN = ("prompt", "class_labels", "generator", "output_type", "callback_on_step_end", "return_dict")


@dataclass(frozen=True)
class Sampling:
    """How a pipeline is called: prompts (or classes), and keyword arguments such as num_inference_steps."""

    prompts: tuple[str, ...]
    call: dict[str, Any]


def sampling_of(folder: Path, prompts: Path | None, call: dict[str, Any]) -> Sampling:
    """What the user says, over what the folder says. prompts: a text file, one a line.

    Raises BadCalibration for a file without prompts, UsageError for arguments that are qkit's to give.
    """
    own: Any = load_json(contained(folder.resolve(), SAMPLING), "sampling") if (folder / SAMPLING).is_file() else {}
    said: dict[str, Any] = own if isinstance(own, dict) else {"call": None}
    listed = said.get("prompts", [])
    if not isinstance(said.get("call", {}), dict) or not isinstance(listed, list) or not all(map(_is_prompt, listed)):
        raise BadCalibration(
            f"{folder / SAMPLING}: expected an object with 'call', an object, and 'prompts', a list of texts"
        )
    taken = next((name for name in (*said.get("call", {}), *call) if name in _OWN), None)
    if taken is not None:
        raise UsageError(f"--call {taken}: qkit gives this argument itself: leave it out")
    found = [str(p) for p in own.get("prompts", ())]
    if prompts is not None:
        text, _ = TextFile(prompts, "prompts", BadCalibration).text()
        found = [line.strip() for line in text.splitlines() if line.strip()]
        if not found:
            raise BadCalibration(f"{prompts}: no prompt in it, expected one a line")
    if not found:
        raise UsageError(f"{folder} comes without prompts: add --calib FILE, a text file with one prompt per line")
    return Sampling(tuple(found), {**own.get("call", {}), **call})


def _is_prompt(value: Any) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool)


def chosen_steps(count: int, prompt: int, most: int) -> tuple[int, ...]:
    """The steps of a schedule of ``count`` that are kept of the prompt of that number, at the most ``most``."""
    parts = min(STRATA, count, most)
    edges = [count * i // parts for i in range(parts + 1)]
    return tuple(a + prompt % (b - a) for a, b in pairwise(edges))


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Calls of a pipeline's transformer, made anew each time they are asked for: the same ones.

    samples: how many (prompt, step) pairs; each gives as many rows as the pipeline has guidance branches
    cap: bytes that one row may take in memory; the others are on the disk meanwhile
    """

    folder: Path
    sampling: Sampling
    samples: int
    seed: int
    dtype: torch.dtype
    cap: int = 1 << 30

    @property
    def digest(self) -> str:
        """sha256 of all that decides what the calls are, but for the pipeline."""
        made = [self.sampling.prompts, self.sampling.call, self.samples, self.seed, STRATA]
        return hashlib.sha256(json.dumps(made, sort_keys=True, default=str).encode()).hexdigest()

    def calls(self, folder: Path) -> Iterator[dict[str, Any]]:
        """Keyword arguments of the transformer, call after call, read from a file in ``folder`` that is gone afterwards.

        Raises BadCalibration for a call that takes more memory than the cap, and as ``sample`` does.
        """
        pipeline = load_pipeline(self.folder, self.dtype, "cpu")
        pipeline.set_progress_bar_config(disable=True)
        left, number = self.samples, 0
        while left > 0:
            prompt = self.sampling.prompts[number % len(self.sampling.prompts)]
            keep = _Kept(prompt=number, most=left, file=OffloadedTensors(folder), cap=self.cap)
            sample(pipeline, prompt, self.sampling.call, self.seed + number, keep)
            if not keep.kept:
                raise BadCalibration(
                    f"{self.folder}: the pipeline did not call its transformer with {self.sampling.call}"
                )
            yield from (keep.read(call) for step in sorted(keep.kept) for call in keep.kept[step])
            left, number = left - len(keep.kept), number + 1


@dataclass(kw_only=True)
class _Kept:
    """The calls of the transformer that one prompt's run is to keep, by step: tensors as places in a file."""

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
        return _Place(len(self.file) - 1)

    def read(self, call: dict[str, Any]) -> dict[str, Any]:
        """A call with its tensors."""
        found: dict[str, Any] = mapped(lambda v: self.file[v.index] if isinstance(v, _Place) else v, call)
        return found


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in a file of tensors."""

    index: int


def subject(pipeline: Any, prompt: str) -> dict[str, Any]:
    """What says what is to be made: a prompt, or of a pipeline that knows classes only the number of one."""
    takes = "prompt" in inspect.signature(pipeline.__call__).parameters
    return {"prompt": prompt} if takes else {"class_labels": [int(prompt)]}


def check_call(made: type, call: Iterable[str]) -> Mapping[str, Any]:
    """The parameters of a pipeline's class. Raises UsageError for arguments that it does not take."""
    known = inspect.signature(made.__call__).parameters
    wrong = next((name for name in call if name not in known), None)
    if wrong is not None:
        raise UsageError(f"--call {wrong}: {made.__name__} takes no such argument{did_you_mean(wrong, list(known))}")
    return known


def sample(pipeline: Any, prompt: str, call: dict[str, Any], seed: int, keep: _Kept | None = None) -> Tensor:
    """Run the pipeline's own sampler on one prompt, to latents where it can, which are returned, and keep some calls of its
    transformer.

    Raises BadCalibration for arguments that the pipeline does not take, and where its scheduler changes the number of
    steps while it runs: steps could not be told apart then.
    """
    model = getattr(pipeline, DENOISER)
    signature = inspect.signature(model.forward)
    clock, counts = Clock(), set[int]()

    def look(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(signature.bind(*args, **kwargs).arguments)
        given.pop("return_dict", None)
        clock.tick(given["timestep"], given["hidden_states"])
        count = len(pipeline.scheduler.timesteps)
        counts.add(count)
        if len(counts) > 1 or clock.step >= count:
            raise BadCalibration(
                f"the scheduler {type(pipeline.scheduler).__name__} changed its steps in mid-run ({clock.step + 1} so far, of "
                f"{' then '.join(map(str, sorted(counts)))}): use one with a fixed schedule"
            )
        if keep is not None:
            keep.add(clock.step, count, {k: v for k, v in given.items() if v is not None})

    known = check_call(type(pipeline), call)
    output = "np" if "class_labels" in known else "latent"
    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.inference_mode(), quiet():
            made = pipeline(
                **subject(pipeline, prompt), **call, generator=torch.Generator().manual_seed(seed), output_type=output
            )
    except (ValueError, TypeError, RuntimeError, LookupError, AttributeError) as e:
        raise BadCalibration(f"the pipeline cannot sample {shown(prompt)} with {call}: {reason(e)}") from e
    finally:
        handle.remove()
    return torch.as_tensor(made.frames if hasattr(made, "frames") else made.images).float()
