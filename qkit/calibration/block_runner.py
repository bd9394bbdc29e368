"""Runs calibration rows through a block, linear after linear, and computes every product once.

Later linears of a block see the error of earlier ones, so the block runs again after each group is solved. Two
shortcuts keep this cheap: a run ends at the group in question (``_Reached``), and a submodule whose linears are all solved is
replaced by its recorded output. An attention or MLP module returns the output of its last linear; its input there is kept
in a file while it is captured, multiplied once the linear is solved, and played back in later runs (``playback.Playback``).
A test run checks that a submodule returns its last linear's output; a submodule that does not simply runs again.

Files, not memory, hold these intermediates: they are read right after they are written and mostly never leave the page
cache, and resident memory does not grow with the number of rows.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qkit.calibration.block_calls import Call, OneByOne
from qkit.calibration.group_inputs import group_inputs_of
from qkit.calibration.playback import Playback, PlaybackUnit
from qkit.calibration.reading import PLAIN_READING, Reading
from qkit.calibration.stack_inputs import watch_stacks
from qkit.calibration.statistics import (
    MAX_BAD_ROWS,
    SAMPLE_TOKENS,
    Accumulator,
    PieceStats,
    Rows,
    Stats,
    StatsRequest,
    piece_of,
    run_pending,
    strides,
)
from qkit.errors import BadCalibration, NumericFailure, Unsupported
from qkit.families.blocks import BlockStructure, LinearGroup
from qkit.families.matrices import matrix_of
from qkit.files.foreign import reason
from qkit.files.owned import temp_path
from qkit.system.memory import give_back, ran_out
from qkit.system.parallel import Workers

Span = tuple[int, int]


class PieceCallback(Protocol):
    """A callback that is called after every piece; it may raise to stop the run."""

    def __call__(self, amount: int = 1) -> None: ...


class _Reached(Exception):
    """Ends a run of the block once all requested inputs are captured."""


class BlockRunner:
    """Runs calibration rows through one block while its linears are solved.

    stages: groups to capture and solve together, in running order (experts are one stage)
    beyond: indices of rows with finite values above ``Rows.largest``
    """

    def __init__(
        self, block: nn.Module, structure: BlockStructure, rows: Rows, call: Call | OneByOne, pool: Workers
    ) -> None:
        self.block, self.structure, self.rows, self.call, self.pool = block, structure, rows, call, pool
        self.beyond: set[int] = set()  # rows with finite values above ``Rows.largest``
        self._local = threading.local()
        self._calls = Counter[str]()  # of linears, in one pass of the block
        self._units = self._find_units()
        self.stages = self._in_running_order()
        self._replaced: dict[str, nn.Module] = {}

    def _in_running_order(self) -> list[tuple[LinearGroup, ...]]:
        """Units of the block as one pass called them; experts, and what it did not call, come last."""
        places = {name: place for place, name in enumerate(self._calls)}

        def place(unit: tuple[LinearGroup, ...]) -> int:
            return places.get(unit[0].hook, len(places)) if unit[0].expert is None else len(places)

        return sorted(self.structure.units, key=place)

    # ---- capture ---------------------------------------------------------------------------------------------

    def capture(
        self, groups: tuple[LinearGroup, ...], request: StatsRequest, step: PieceCallback, keep: bool = True,
        readings: Mapping[str, Reading] | None = None, originals: Mapping[str, Path] | None = None,
    ) -> dict[str, Stats]:  # fmt: skip
        """{group key: Stats} over all good rows. A group that no token reached has statistics of none.

        keep:      store the input of a submodule's last linear, so that the submodule can be played back once it is solved
        readings:  {group key: what becomes of its inputs before statistics are taken}
        originals: {submodule: file of its inputs in the original model, as ``leave`` saves them}, for the drift
        """
        reading_of = {g.key: (readings or {}).get(g.key, PLAIN_READING) for g in groups}
        sums = {g.key: Accumulator(g.linears[0].shape[1], request, self.rows.dtype, self.rows.device) for g in groups}
        stride = max(1, self.rows.total // SAMPLE_TOKENS)
        kinds = self.rows.kinds
        strides_by_kind = [] if kinds is None else strides(kinds)
        ends = {g.hook for g in groups} if keep else set()
        unit = next((u for u in self._units if u.last in ends), None)
        unit_file = None if unit is None else self._file(f"{unit.path}.in").open("wb")
        handles = self._hooks({g.hook for g in groups if g.hook})
        watched = {x.param for g in groups if g.stack for x in g.linears}

        def one(span: Span) -> tuple[dict[str, PieceStats], Tensor | None, list[int], list[int]]:
            hidden = self.rows.read(*span)
            with watch_stacks(self.block, watched) as stacked:
                arguments = self._run(span, hidden, stop=not watched)
            valid = self.rows.valid(*span)
            group_inputs = self._inputs_of(arguments, groups, valid, request)
            bad, beyond = self._apart(span, groups) if _peak(group_inputs.values()) > self.rows.largest else ([], [])
            if bad:
                valid = self.rows.without(bad).valid(*span)
                group_inputs = self._inputs_of(arguments, groups, valid, request)
            group_inputs |= {g.key: x for g in groups if g.stack and (x := stacked.inputs_of(g)) is not None}
            group_inputs = {key: reading_of[key].transformed(x) for key, x in group_inputs.items()}
            saved = {g.key: y for g in groups if (y := self._saved(g, originals, span, valid)) is not None}
            token_kinds = None if kinds is None else kinds[slice(*span)].flatten()
            token_kinds = token_kinds if token_kinds is None or valid is None else token_kinds[valid]

            def piece_stats(key: str, x: Tensor) -> PieceStats:
                own_kinds = token_kinds if token_kinds is not None and len(token_kinds) == len(x) else None
                reading = reading_of[key]
                roots = reading.roots(len(x), slice(*span), valid)
                piece = piece_of(x, stride, request.ranges, own_kinds, strides_by_kind, reading.entering(x, roots))
                return replace(piece, away=reading.away(saved[key], x, roots)) if key in saved else piece

            pieces = {key: piece_stats(key, x) for key, x in group_inputs.items() if len(x)}
            ended = None if unit is None else arguments.get(unit.last)
            return pieces, None if ended is None else ended[0], bad, beyond

        left_out: list[int] = []
        try:
            spans = list(self.rows.pieces())
            for (start, _), (pieces, x, bad, beyond) in zip(spans, self.pool.stream(one, spans), strict=True):
                left_out += bad
                self.beyond.update(beyond)
                if unit_file is not None and x is not None:
                    unit_file.write(_bytes(x))
                for key, piece in pieces.items():
                    sums[key].add(piece, self.rows.part_of(start))
                run_pending(sums.values(), self.pool, everything=False)
                step()
            run_pending(sums.values(), self.pool, everything=True)
        finally:
            for handle in handles:
                handle.remove()
            if unit_file is not None:
                unit_file.close()
        self.rows = self.rows.without(left_out)
        self._refuse_too_many(len(left_out))
        if max(accumulator.width for accumulator in sums.values()) >= 1024:
            give_back()  # what the runs left free is not what the solver is about to ask for
        return {key: accumulator.finish(strides_by_kind) for key, accumulator in sums.items()}

    def _inputs_of(
        self,
        arguments: dict[str, tuple[Any, ...]],
        groups: tuple[LinearGroup, ...],
        valid: Tensor | None,
        request: StatsRequest,
    ) -> dict[str, Tensor]:
        return group_inputs_of(arguments, self.block, self.structure.experts, groups, valid, request.expert_share)

    def _apart(self, span: Span, groups: tuple[LinearGroup, ...]) -> tuple[list[int], list[int]]:
        """Of the good rows of a piece, (those with non-finite inputs, those with finite inputs beyond ``Rows.largest``)."""
        peaks = {}
        for i in (i for i in range(*span) if self.rows.good[i]):
            arguments = self._run((i, i + 1), self.rows.read(i, i + 1), stop=True)
            valid = self.rows.valid(i, i + 1)
            peaks[i] = _peak(group_inputs_of(arguments, self.block, self.structure.experts, groups, valid).values())
        bad = [i for i, peak in peaks.items() if peak == math.inf]
        return bad, [i for i, peak in peaks.items() if self.rows.largest < peak < math.inf]

    def _refuse_too_many(self, bad: int) -> None:
        """Raises NumericFailure where more than MAX_BAD_ROWS of the rows have values that are not finite."""
        if bad > MAX_BAD_ROWS * self.rows.count:
            raise NumericFailure(
                f"{bad} of {self.rows.count} calibration samples have non-finite activations in {self.structure.path}, more "
                f"than {MAX_BAD_ROWS:.0%}: use other calibration text, or a checkpoint in bf16 if this one is fp16"
            )

    def _hooks(self, names: set[str]) -> list[Any]:
        calls = sum(max(1, self._calls[n]) for n in names)

        def hook(name: str) -> Callable[..., None]:
            def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                entered = args or tuple(kwargs.values())  # some blocks call a linear with its argument's name
                seen = self._local.seen
                if name in seen and self._calls[name] > 1:
                    entered = (torch.cat([x.reshape(-1, x.shape[-1]) for x in (seen[name][0], entered[0])]),)
                seen[name], self._local.count = entered, self._local.count + 1
                if self._local.stop and self._local.count == calls:
                    raise _Reached

            return keep

        # Kept before any other hook: what is captured is the input before its activations are quantized.
        modules = [(n, self.block.get_submodule(n)) for n in sorted(names)]
        return [m.register_forward_pre_hook(hook(n), prepend=True, with_kwargs=True) for n, m in modules]

    def _run(self, span: Span, hidden: Tensor, stop: bool) -> dict[str, tuple[Any, ...]]:
        self._local.seen, self._local.count, self._local.stop, self._local.span = {}, 0, stop, span
        with suppress(_Reached):
            self._local.out = self.call(self.block, hidden, slice(*span))
        return dict(self._local.seen)

    def _saved(
        self, group: LinearGroup, originals: Mapping[str, Path] | None, span: Span, valid: Tensor | None
    ) -> Tensor | None:
        """Inputs of the group in the original model, [valid tokens, in]; None where they are not saved."""
        if not originals or group.hook not in originals or group.expert is not None or self._calls[group.hook] != 1:
            return None
        width = group.linears[0].shape[1]
        x = replace(self.rows, path=originals[group.hook], hidden=width).read(*span).reshape(-1, width)
        return x if valid is None else x[valid]

    # ---- playback --------------------------------------------------------------------------------------------

    def _find_units(self) -> list[PlaybackUnit]:
        """Submodules that return the output of their last linear, as a run of one row shows."""
        candidates: dict[str, PlaybackUnit] = {}
        for group in self.structure.groups:
            path = group.hook.rpartition(".")[0]
            if group.expert is None and path and len(group.linears) == 1:
                candidates[path] = PlaybackUnit(path, group.hook, group.linears[0].shape[0])
        outputs: dict[str, Any] = {}

        def note(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
            return lambda module, args, out: outputs.__setitem__(name, out)

        calls = self._calls

        def count(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            return lambda module, args: calls.update((name,))

        names = {n for u in candidates.values() for n in (u.path, u.last)}
        handles = [self.block.get_submodule(n).register_forward_hook(note(n)) for n in sorted(names)]
        hooks = {g.hook for g in self.structure.groups if g.hook}
        handles += [self.block.get_submodule(n).register_forward_pre_hook(count(n)) for n in sorted(hooks)]
        entered = self.rows.read(0, 1)
        try:
            with torch.inference_mode():
                self.call(self.block, entered, slice(0, 1))
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as e:
            if ran_out(e):
                raise
            raise Unsupported(
                f"{self.structure.path} does not run by itself on calibration rows: {reason(e)}: use a method without "
                "calibration (rtn with a weight-only scheme)"
            ) from e
        finally:
            for handle in handles:
                handle.remove()
        units = []
        for unit in (u for u in candidates.values() if calls[u.last] == 1):
            returned, linear_out = outputs.get(unit.path), outputs.get(unit.last)
            hidden_out, others = (returned[0], returned[1:]) if isinstance(returned, tuple) else (returned, None)
            if (
                hidden_out is None
                or linear_out is None
                or hidden_out is not linear_out
                or linear_out.shape[:-1] != entered.shape[:-1]
            ):
                continue
            if all(r is None for r in others or ()):
                units.append(replace(unit, rest=None if others is None else len(others)))
        return units

    def solved(self, groups: tuple[LinearGroup, ...], step: PieceCallback) -> None:
        """Play back the submodules that end with ``groups``. The block must hold the quantized weights of these groups."""
        for unit in self._units:
            if any(g.hook == unit.last for g in groups):
                self._play(unit, step)

    def _play(self, unit: PlaybackUnit, step: PieceCallback) -> None:
        linear = self.block.get_submodule(unit.last)
        config = replace(self.rows, path=self._file(f"{unit.path}.in"), hidden=_width(linear, unit))
        with self._file(f"{unit.path}.out").open("wb") as f:
            for out in self.pool.stream(lambda span: linear(config.read(*span)), self.rows.pieces()):
                f.write(_bytes(out))
                step()
        config.path.unlink()
        played = replace(self.rows, path=self._file(f"{unit.path}.out"), hidden=unit.width)
        self._replaced[unit.path] = self.block.get_submodule(unit.path)
        replaced = self._replaced[unit.path]
        self.block.set_submodule(unit.path, Playback(replaced, lambda: played.read(*self._local.span), unit.rest))

    def _file(self, name: str) -> Path:
        return temp_path(self.rows.path.parent, name)

    # ---- leaving the block -----------------------------------------------------------------------------------

    def leave(self, out: Path, step: PieceCallback, save: Mapping[str, Path] | None = None) -> tuple[Rows, str]:
        """The rows that leave the solved block, written to the file ``out``, and their sha256.

        save: {submodule: file for its inputs}, [tokens, in] row after row; none for one that does not run once in a pass.
        Rows that turned non-finite are marked; raises NumericFailure above MAX_BAD_ROWS of them.
        """
        good: list[bool] = []
        digest, save = hashlib.sha256(), {n: path for n, path in (save or {}).items() if self._calls[n] == 1}
        handles = self._hooks(set(save))

        def one(span: Span) -> tuple[Tensor, Tensor, dict[str, Tensor], list[int]]:
            arguments = self._run(span, self.rows.read(*span), stop=False)
            result: Tensor = self._local.out.to(self.rows.dtype)
            finite = result.isfinite()
            unreached = next((name for name in save if name not in arguments), None)
            if unreached is not None:
                raise _unreached(f"{self.structure.path}.{unreached}")
            entered = {name: arguments[name][0] for name in save}
            if self.rows.lead_shapes:
                return result, finite.all()[None], entered, []
            bounded = self.rows.dtype != torch.bfloat16
            peaks = result.abs().flatten(1).amax(1) if bounded else result.new_zeros(len(result))
            over = ((peaks > self.rows.largest) & peaks.isfinite()).nonzero()[:, 0]
            return result, finite.flatten(1).all(1), entered, [span[0] + int(i) for i in over]

        with ExitStack() as stack:
            for handle in handles:
                stack.callback(handle.remove)
            files = {name: stack.enter_context(path.open("wb")) for name, path in save.items()}
            f = stack.enter_context(out.open("wb"))
            for result, finite, entered, beyond in self.pool.stream(one, self.rows.pieces()):
                self.beyond.update(beyond)
                for name, x in entered.items():
                    files[name].write(_bytes(x))
                good += [
                    g and bool(is_finite) for g, is_finite in zip(self.rows.good[len(good) :], finite, strict=False)
                ]
                data = _bytes(result)
                f.write(data)
                digest.update(data)
                step()
        self._refuse_too_many(good.count(False))
        return replace(self.rows, path=out, good=good), digest.hexdigest()

    def close(self) -> None:
        """Put every module back and remove the intermediate files."""
        for path, module in self._replaced.items():
            self.block.set_submodule(path, module)
        self._replaced = {}
        for unit in self._units:
            for end in ("in", "out"):
                self._file(f"{unit.path}.{end}").unlink(missing_ok=True)


def _unreached(name: str) -> BadCalibration:
    return BadCalibration(f"no calibration sample reached {name}: its block runs without calling this linear")


def _peak(inputs: Iterable[Tensor]) -> float:
    """The largest magnitude; infinite where a value is not finite."""
    ends = [end for x in inputs if len(x) for end in x.aminmax()]
    return max((float(e.abs()) if bool(e.isfinite()) else math.inf for e in ends), default=0.0)


def _width(linear: nn.Module, unit: PlaybackUnit) -> int:
    found = matrix_of(linear)
    assert found is not None, unit.last
    return found[1]


def _bytes(t: Tensor) -> Any:
    return t.contiguous().cpu().view(torch.uint8).numpy().reshape(-1).data
