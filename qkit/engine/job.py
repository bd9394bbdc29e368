"""The job folder, which lets an interrupted run continue.

    job.json            marks the folder as a job; the identity of the job (plan, versions, source)
    journal.jsonl       one line per finished block; the line is the commit
    parts/NNNN.safetensors   a block's quantized and rewritten tensors
    rows/NNNN.bin       hidden states that enter block NNNN
    lock                held while a process works here

``files.job_folder`` defines a job folder, and which of its files may be removed.

A block is committed in this order: its part and the rows after it are on the disk, then its line is appended and synced.
An incomplete last line is dropped. The rows that enter a block stay until the block is committed, so a run can continue after a
kill at any moment. Opening a folder of another job is refused, and the message names the field that differs. A job that
committed nothing may be replaced, so a mistyped argument can be corrected.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkit.errors import BadInput, JobConflict, NumericFailure, write_failure
from qkit.files.job_folder import KIND, VERSION, locked, parts_in, read_job, refuse_foreign, remove_bulk
from qkit.files.owned import is_temp
from qkit.files.safefile import (
    TensorInfo,
    parse_json,
    read_header,
    read_tensor,
    save_tensors,
    sha256_file,
    sync_dir,
    write_atomic,
)
from qkit.planning.renamed import record_under_current_names
from qkit.tensor import lowrank, sparse
from qkit.tensor.formats import Format
from qkit.tensor.input_transform import RESIDUAL, SCALE, InputTransform
from qkit.tensor.qtensor import Params, QTensor

WHOLE = "whole"  # the stage that learns the scales of all linears together
# Of a linear in a part: "<linear>:<piece>". 'original' is a weight that a transform rewrote, before it was quantized.
_BESIDE = (*sparse.PIECES, *lowrank.PIECES)
_PARAMS = ("scale", "zero", "global_scale", "minimum", "super_scale", "super_minimum")
PIECES = ("codes", *_PARAMS, "input_scale", "original", SCALE, RESIDUAL, *_BESIDE)

_HEADERS = 4  # of parts, kept at a time: of a block, and of the stages after the last


def finished_blocks(path: Path) -> int:
    """Number of committed blocks in a job folder; 0 where there is none, or the job is done."""
    file = path / "journal.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() and parts_in(path) else 0


def clear(path: Path, identity: dict[str, Any]) -> bool:
    """Remove what a run left in the folder of this job that was killed after its result had its name. Any other folder stays
    as it is; gives whether it is this job's. Raises as ``Job.open``."""
    if not (path / "job.json").is_file():
        return False
    refuse_foreign(path)
    with locked(path):
        job = Job(path, json.loads(json.dumps(identity)))
        stored = record_under_current_names(read_job(path / "job.json"))
        stored.pop("finished", None)
        if _first_difference(job.identity, stored) is not None:
            return False
        try:
            job._clean()
            job.remove_bulk()
        except OSError as e:
            raise write_failure(path, e) from e
    return True


class Job:
    """An open job folder. Use ``Job.open`` as a context manager."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.identity = identity
        self.entries: dict[int, dict[str, Any]] = {}
        self._headers: dict[int, dict[str, TensorInfo]] = {}  # of the parts that were read last

    @classmethod
    @contextmanager
    def open(cls, path: Path, identity: dict[str, Any]) -> Iterator[Job]:
        """Create the folder, or go on in it when it belongs to the same job.

        Raises UsageError for a folder that is no job's, JobConflict when another process holds it or another job owns it,
        BadInput when it is damaged or has links in it.
        """
        refuse_foreign(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise write_failure(path, e) from e
        with locked(path):
            refuse_foreign(path)  # once more, now that no other run of qkit changes it
            job = cls(path, json.loads(json.dumps(identity)))
            try:
                job._claim()
                for folder in ("parts", "rows"):
                    (path / folder).mkdir(exist_ok=True)
            except OSError as e:
                raise write_failure(path, e) from e
            job._read_journal()
            job._clean()
            yield job

    def _claim(self) -> None:
        """Write job.json for this job. Raises JobConflict where another job owns the folder and has committed blocks."""
        file, journal = self.path / "job.json", self.path / "journal.jsonl"
        stored = record_under_current_names(read_job(file)) if file.exists() else None
        if stored is not None and stored.pop("finished", False):
            # A finished job: the same command makes its output again.
            remove_bulk(self.path)
            journal.unlink(missing_ok=True)
            stored = None
        if stored is not None and (parts_in(self.path) or journal.exists()):
            different = _first_difference(self.identity, stored)
            if different is not None:
                field, now, before = different
                raise JobConflict(
                    f"{self.path} holds another job: {field} is {before!r} there and {now!r} now: run the original command "
                    "to finish it, or choose another --work folder, or delete this one"
                )
            return
        self._write({})

    def _write(self, state: dict[str, Any]) -> None:
        content = {"kind": KIND, "version": VERSION, **self.identity, **state}
        write_atomic(self.path / "job.json", json.dumps(content, indent=1, sort_keys=True).encode())

    def _read_journal(self) -> None:
        file = self.path / "journal.jsonl"
        if not file.exists():
            return
        raw = file.read_bytes()
        whole, _, torn = raw.rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
            entry = parse_json(line, str(file))
            if not isinstance(entry, dict) or entry.pop("sum", None) != _sum(entry):
                raise BadInput(
                    f"{file}: line {number} is not what was written (its sum differs): the job folder is damaged; delete "
                    f"{self.path} to start again"
                )
            self.entries[int(entry["block"])] = entry
        if sorted(self.entries) != list(range(len(self.entries))):
            raise BadInput(
                f"{file}: blocks {sorted(self.entries)} are not consecutive: delete {self.path} to start again"
            )
        if torn:
            with file.open("r+b") as f:
                f.truncate(len(raw) - len(torn))
                os.fsync(f.fileno())

    def _clean(self) -> None:
        """Remove temporary files of a killed run. Raises BadInput for committed blocks whose files changed."""
        for folder in (self.path / name for name in ("parts", "rows", ".") if (self.path / name).is_dir()):
            for orphan in folder.iterdir():
                if is_temp(orphan.name) and orphan.is_file() and not orphan.is_symlink():
                    orphan.unlink()
        for index in sorted(self.entries):
            entry, part = self.entries[index], self.part_path(index)
            if part.exists() and sha256_file(part) == entry["part"]:
                continue
            raise BadInput(
                f"{part}: missing or not what the journal recorded (sha256): the job folder is damaged; delete "
                f"{self.path} to start again"
            )

    # ---- blocks ------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> int:
        """Number of committed blocks."""
        return len(self.entries)

    def part_path(self, index: int) -> Path:
        return self.path / "parts" / f"{index:04d}.safetensors"

    def rows_path(self, index: int, original: bool = False) -> Path:
        """File of the rows that enter block ``index``; original: of those in the original model."""
        return self.path / "rows" / f"{index:04d}{'-original' if original else ''}.bin"

    def rows_entering(self, index: int) -> dict[str, Any] | None:
        """The journal's record of the rows that enter block ``index``, checked against the file. Raises BadInput."""
        record: dict[str, Any] | None = self.entries[index - 1].get("rows") if index else None
        for field, path in (("sha256", self.rows_path(index)), ("original", self.rows_path(index, original=True))):
            digest = None if record is None else record.get(field)
            if digest is not None and (not path.exists() or sha256_file(path) != digest):
                raise BadInput(f"{path}: not the rows that the journal recorded: delete {self.path} to start again")
        return record

    def commit(
        self, index: int, tensors: dict[str, Tensor], entry: dict[str, Any], rows: dict[str, Any] | None
    ) -> None:
        """Make block ``index`` durable.

        rows: {'sha256', 'good'} of the rows that leave it, already written to ``rows_path(index + 1)``, and 'original' of
        those beside them, if there are such; None without rows.
        """
        _refuse_not_finite({"block": index, **entry})
        record = {"block": index, "part": save_tensors(self.part_path(index), tensors), **entry}
        if rows is not None:
            for original in (False, True)[: 1 + ("original" in rows)]:
                with self.rows_path(index + 1, original).open("rb") as f:
                    os.fsync(f.fileno())
            sync_dir(self.path / "rows")
            record["rows"] = rows
        line = json.dumps({**record, "sum": _sum(record)}, sort_keys=True).encode() + b"\n"
        file = self.path / "journal.jsonl"
        try:
            with file.open("ab") as f:
                f.write(line)
                f.flush()
                os.fsync(f.fileno())
        except OSError as e:
            raise write_failure(file, e) from e
        if index == 0:
            sync_dir(self.path)
        self.entries[index] = record
        self._headers.pop(index, None)
        for original in (False, True):
            self.rows_path(index, original).unlink(missing_ok=True)

    def part(self, index: int) -> dict[str, TensorInfo]:
        """{name: header} of the tensors in a block's part.

        It is asked for with every linear, and a block of many experts has thousands of tensors: those of a committed part,
        which stays as it is, are read once."""
        header = self._headers.get(index)
        if header is None:
            header = read_header(self.part_path(index))
            if index in self.entries:
                self._headers = {**dict(list(self._headers.items())[1 - _HEADERS :]), index: header}
        return header

    def read(self, info: TensorInfo) -> Tensor:
        with torch.inference_mode():
            return read_tensor(info)

    def quantized(self, index: int, name: str, fmt: Format) -> tuple[QTensor, Tensor | None]:
        """The quantized weight of a linear in block ``index``, and the static scale of its activations, float32 [1] or None."""
        part = self.part(index)
        not_solved = ("original", SCALE, RESIDUAL)
        infos = {k: part[f"{name}:{k}"] for k in PIECES if f"{name}:{k}" in part and k not in not_solved}
        for stage, later in ((WHOLE, ("scale", "super_scale")), ("repair", sparse.PIECES)):
            stage_index = self.stage(stage)
            stage_part = {} if stage_index is None else self.part(stage_index)
            infos.update({k: stage_part[f"{name}:{k}"] for k in later if f"{name}:{k}" in stage_part})
        tensors = {k: self.read(info) for k, info in infos.items()}
        params = Params(**{k: tensors[k] for k in _PARAMS if k in tensors})
        branch = lowrank.read(tensors, (tensors["codes"].shape[0], tensors["codes"].shape[1]))
        q = QTensor(tensors["codes"], params, fmt, sparse.read(tensors), branch)
        return q, tensors.get("input_scale")

    def inputs(self, index: int, name: str, columns: int, rotation: int) -> InputTransform:
        """The run-time transform of the inputs of a linear in block ``index``."""
        part = self.part(index)
        scale, residual = (self.read(part[n]) if (n := f"{name}:{k}") in part else None for k in (SCALE, RESIDUAL))
        return InputTransform.of(scale, rotation, residual, columns)

    def stage(self, name: str) -> int | None:
        """Index of the part that a stage after the last block committed: "whole", scales of all linears; "repair", their sparse
        parts; "cache", the scales of the KV cache."""
        return next((i for i, entry in self.entries.items() if entry.get("stage") == name), None)

    def records(self) -> dict[str, dict[str, Any]]:
        """{linear: its last record in the journal}."""
        return {name: record for i in sorted(self.entries) for name, record in self.entries[i]["linears"].items()}

    def remove_bulk(self) -> None:
        """Remove tensors and rows after a verified export; the journal stays as the record of the run."""
        self._write({"finished": True})
        remove_bulk(self.path)


def _refuse_not_finite(entry: dict[str, Any]) -> None:
    """Raises NumericFailure for an entry with a NaN or an infinity, which could never be read back."""
    for name, record in entry.get("linears", {}).items():
        for field in ("error", "baseline_error"):
            if not math.isfinite(record.get(field, 0.0)):
                raise NumericFailure(
                    f"{name}: its {field} is {record[field]}, expected a finite number: look for very large weights or inputs "
                    "of this layer, or keep it in full precision with a rule that skips it"
                )
    try:
        json.dumps(entry, allow_nan=False)
    except ValueError as e:
        raise NumericFailure(
            f"block {entry.get('block')}: an error of this block is not finite: use other calibration text, or another --method"
        ) from e


def _sum(record: dict[str, Any]) -> str:
    """sha256 of a journal entry: tells a changed line from a written one."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _first_difference(expected: Any, actual: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """(dotted field, wanted, found) of the first place where two JSON values differ."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        for key in sorted({*expected, *actual}):
            if key not in expected or key not in actual:
                return f"{path}{key}", expected.get(key), actual.get(key)
            deeper = _first_difference(expected[key], actual[key], f"{path}{key}.")
            if deeper:
                return deeper
        return None
    return None if expected == actual else (path.rstrip("."), expected, actual)
