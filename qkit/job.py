"""The job folder: what makes a run durable.

    job.json            the identity of the job (plan, versions, source), written once
    journal.jsonl       one line per finished block; the line is the commit
    parts/NNNN.safetensors   a block's quantized and rewritten tensors
    rows/NNNN.bin       hidden states that enter block NNNN
    lock                held while a process works here

A block is committed in this order: its part and the rows after it are on the disk, then its line is appended and synced.
A torn last line is dropped. The rows that enter a block stay until the block is committed, so a kill at any moment
leaves a state to go on from. Opening a folder of another job is refused with the field that differs, unless that
job committed nothing: whoever corrects a mistyped argument is not kept from it by what the mistake left.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkit import lowrank, sparse
from qkit.errors import BadInput, JobConflict, write_failure
from qkit.formats import Format
from qkit.inputs import RESIDUAL, SCALE, InputTransform
from qkit.qtensor import Params, QTensor
from qkit.safefile import (
    TensorInfo,
    parse_json,
    read_header,
    read_tensor,
    save_tensors,
    sha256_file,
    sync_dir,
    write_atomic,
)

VERSION = 1
WHOLE = "whole"  # the stage that learns the codes of all linears together
# Of a linear in a part: "<linear>:<piece>". 'original' is a weight that a transform rewrote, before it was quantized.
_BESIDE = (*sparse.PIECES, *lowrank.PIECES)
PIECES = ("codes", "scale", "zero", "global_scale", "input_scale", "original", SCALE, RESIDUAL, *_BESIDE)


def finished_blocks(path: Path) -> int:
    """How many blocks a run would find in that folder, by its journal; 0 where there is none, or the job is done."""
    file = path / "journal.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() and (path / "parts").is_dir() else 0


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

        Raises JobConflict when another process holds it or another job owns it, BadInput when it is damaged.
        """
        try:
            # A journal without parts is the record of a finished job (``remove_bulk``): its output was made, and whoever
            # asks again wants it made again.
            finished = (path / "journal.jsonl").exists() and not (path / "parts").exists()
            (path / "parts").mkdir(parents=True, exist_ok=True)
            (path / "rows").mkdir(exist_ok=True)
        except OSError as e:
            raise write_failure(path, e) from e
        with _lock(path):
            job = cls(path, json.loads(json.dumps(identity)))
            if finished:
                (path / "journal.jsonl").unlink()
                (path / "job.json").unlink(missing_ok=True)
            job._claim()
            job._read_journal()
            job._clean()
            yield job

    def _claim(self) -> None:
        file = self.path / "job.json"
        if not file.exists() or not self._begun():
            if (self.path / "journal.jsonl").exists():
                raise BadInput(
                    f"{file}: missing, but a journal is there: the job folder is damaged; delete it to start again"
                )
            write_atomic(file, json.dumps({"version": VERSION, **self.identity}, indent=1, sort_keys=True).encode())
            return
        found = parse_json(file.read_bytes(), str(file))
        if not isinstance(found, dict) or found.pop("version", None) != VERSION:
            raise BadInput(f"{file}: not a job of this version of qkit: delete {self.path} to start again")
        different = _first_difference(self.identity, found)
        if different is not None:
            field, wanted, there = different
            raise JobConflict(
                f"{self.path} holds another job: {field} is {there!r} there and {wanted!r} now: run the original command to "
                "finish it, or choose another --work folder, or delete this one"
            )

    def _begun(self) -> bool:
        """Whether anything is there that a run could go on from."""
        committed = any((self.path / "parts").iterdir())
        return committed or any(
            p.name not in ("job.json", "lock", "source", "parts", "rows") for p in self.path.iterdir()
        )

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
        """Remove what a killed run left behind, and undo blocks whose files no longer hold what was committed."""
        for folder in ("parts", "rows", "."):
            for orphan in (self.path / folder).glob(".*tmp*"):
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
        for folder in ("parts", "rows"):
            shutil.rmtree(self.path / folder, ignore_errors=True)


def _sum(record: dict[str, Any]) -> str:
    """sha256 of a journal entry: tells a changed line from a written one."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held until the process ends, however it ends: the kernel releases it."""
    with (path / "lock").open("a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            f.seek(0)
            raise JobConflict(
                f"{path} is in use by another process ({f.read().strip() or 'unknown'}): wait for it"
            ) from e
        f.seek(0)
        f.truncate()
        f.write(f"pid {os.getpid()} on {socket.gethostname()}")
        f.flush()
        yield


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
