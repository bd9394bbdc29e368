"""The job folder: what makes a run durable.

    job.json            says that the folder is a job's, and the identity of the job (plan, versions, source)
    journal.jsonl       one line per finished block; the line is the commit
    parts/NNNN.safetensors   a block's quantized and rewritten tensors
    rows/NNNN.bin       hidden states that enter block NNNN
    lock                held while a process works here

What a job folder is, and what of it may be removed, says ``job_folder``.

A block is committed in this order: its part and the rows after it are on the disk, then its line is appended and synced.
A torn last line is dropped. The rows that enter a block stay until the block is committed, so a kill at any moment
leaves a state to go on from. Opening a folder of another job is refused with the field that differs, unless that
job committed nothing: whoever corrects a mistyped argument is not kept from it by what the mistake left.
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

WHOLE = "whole"  # the stage that learns the codes of all linears together
# Of a linear in a part: "<linear>:<piece>". 'original' is a weight that a transform rewrote, before it was quantized.
_BESIDE = (*sparse.PIECES, *lowrank.PIECES)
PIECES = ("codes", "scale", "zero", "global_scale", "input_scale", "original", SCALE, RESIDUAL, *_BESIDE)


def finished_blocks(path: Path) -> int:
    """How many blocks a run would find in that folder, by its journal; 0 where there is none, or the job is done."""
    file = path / "journal.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() and parts_in(path) else 0


class Job:
    """An open job folder. Use ``Job.open`` as a context manager."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.identity = identity
        self.entries: dict[int, dict[str, Any]] = {}

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
        """Make job.json that of this job, unless another job owns the folder and has committed something."""
        file, journal = self.path / "job.json", self.path / "journal.jsonl"
        stored = record_under_current_names(read_job(file)) if file.exists() else None
        if stored is not None and stored.pop("finished", False):
            # The record of a job whose output was made, and whoever asks again wants it made again.
            remove_bulk(self.path)
            journal.unlink(missing_ok=True)
            stored = None
        if stored is not None and (parts_in(self.path) or journal.exists()):
            different = _first_difference(self.identity, stored)
            if different is not None:
                field, wanted, there = different
                raise JobConflict(
                    f"{self.path} holds another job: {field} is {there!r} there and {wanted!r} now: run the original command "
                    "to finish it, or choose another --work folder, or delete this one"
                )
            return
        self._write({})

    def _write(self, more: dict[str, Any]) -> None:
        content = {"kind": KIND, "version": VERSION, **self.identity, **more}
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
        """Remove what a killed run left unfinished, and refuse blocks whose files no longer hold what was committed."""
        for folder in ("parts", "rows", "."):
            for orphan in (self.path / folder).iterdir():
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
        """Rows that enter block ``index``; original: as they would be if nothing were quantized."""
        return self.path / "rows" / f"{index:04d}{'-original' if original else ''}.bin"

    def rows_entering(self, index: int) -> dict[str, Any] | None:
        """What the journal says of the rows that enter ``index``; checked against the file."""
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
        for original in (False, True):
            self.rows_path(index, original).unlink(missing_ok=True)

    def part(self, index: int) -> dict[str, TensorInfo]:
        """Headers of a block's part."""
        return read_header(self.part_path(index))

    def read(self, info: TensorInfo) -> Tensor:
        with torch.inference_mode():
            return read_tensor(info)

    def quantized(self, index: int, name: str, fmt: Format) -> tuple[QTensor, Tensor | None]:
        """A linear of block ``index`` as it was solved, and the static scale of its activations, if it has one."""
        part = self.part(index)
        apart = ("original", SCALE, RESIDUAL)
        found = {k: part[f"{name}:{k}"] for k in PIECES if f"{name}:{k}" in part and k not in apart}
        for stage, later in ((WHOLE, ("codes",)), ("repair", sparse.PIECES)):
            place = self.stage(stage)
            after = {} if place is None else self.part(place)
            found.update({k: after[f"{name}:{k}"] for k in later if f"{name}:{k}" in after})
        piece = {k: self.read(info) for k, info in found.items()}
        params = Params(piece["scale"], piece.get("zero"), piece.get("global_scale"))
        branch = lowrank.read(piece, (piece["codes"].shape[0], piece["codes"].shape[1]))
        q = QTensor(piece["codes"], params, fmt, sparse.read(piece), branch)
        return q, piece.get("input_scale")

    def inputs(self, index: int, name: str, columns: int, rotation: int) -> InputTransform:
        """What is done at run time to the inputs of a linear of block ``index`` as it was solved."""
        part = self.part(index)
        scale, first = (self.read(part[n]) if (n := f"{name}:{k}") in part else None for k in (SCALE, RESIDUAL))
        return InputTransform.of(scale, rotation, first, columns)

    def stage(self, name: str) -> int | None:
        """Index of the part that a stage after the last block committed: "whole", codes of all linears; "repair", their sparse
        parts; "cache", the scales of the KV cache."""
        return next((i for i, entry in self.entries.items() if entry.get("stage") == name), None)

    def records(self) -> dict[str, dict[str, Any]]:
        """What the journal says of every linear, the last entry about it."""
        return {name: record for i in sorted(self.entries) for name, record in self.entries[i]["linears"].items()}

    def remove_bulk(self) -> None:
        """After a proven export: the tensors are in the output, the journal stays as the record of the run."""
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


def _first_difference(wanted: Any, found: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """(dotted field, wanted, found) of the first place where two JSON values differ."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in sorted({*wanted, *found}):
            if key not in wanted or key not in found:
                return f"{path}{key}", wanted.get(key), found.get(key)
            deeper = _first_difference(wanted[key], found[key], f"{path}{key}.")
            if deeper:
                return deeper
        return None
    return None if wanted == found else (path.rstrip("."), wanted, found)
