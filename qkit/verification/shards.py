"""The check of the weight files of a folder: the shards, their index, and the tensors in them.

Part of the independent proof (see ``verify.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qkit.errors import BadCheckpoint
from qkit.verification.decode import StoredTensor, read_header
from qkit.verification.files import sha256_of
from qkit.verification.record import Findings, Record, as_object, read_json

_SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")  # names a loader looks for without an index
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


def read_folder(out: Path, record: Record | None, findings: Findings) -> dict[str, dict[str, StoredTensor]]:
    """The tensors of every shard that can be read, after checks of the set of files."""
    headers: dict[str, dict[str, StoredTensor]] = {}
    for path in sorted(out.iterdir()):
        is_pickle = path.suffix in _PICKLES
        findings.check(
            "folder", not is_pickle, path.name, "weights in a pickle format do not belong in a packed checkpoint"
        )
        if path.suffix != ".safetensors":
            continue
        if not findings.check("folder", path.is_file() and not path.is_symlink(), path.name, "expected a regular file"):
            continue
        if record is not None:
            recorded_hash = record.shards.get(path.name)
            if findings.check(
                "folder", recorded_hash is not None, path.name, "is not listed in qkit.json; move it away"
            ):
                fault = "its sha256 is not the one in qkit.json: the file changed after the export"
                findings.check("folder", sha256_of(path) == recorded_hash, path.name, fault)
        try:
            headers[path.name] = read_header(path)
        except BadCheckpoint as error:
            where, _, fault = str(error).partition(": ")
            findings.check("folder", False, where, fault)
    for name in record.shards if record else ():
        present = name in headers or (Path(name).name == name and (out / name).is_file())
        findings.check("folder", present, name, "is listed in qkit.json and not in the folder")
    _check_twice(headers, findings)
    _check_index(out, headers, findings)
    return headers


def _check_twice(headers: Mapping[str, Mapping[str, StoredTensor]], findings: Findings) -> None:
    first_shards: dict[str, str] = {}
    for shard, tensors in headers.items():
        for name in tensors:
            first = first_shards.setdefault(name, shard)
            findings.check("folder", first == shard, f"{shard}: {name}", f"is also in {first}")


def _check_index(out: Path, headers: Mapping[str, Mapping[str, StoredTensor]], findings: Findings) -> None:
    indexes = sorted(out.glob("*.safetensors.index.json"))
    files = sorted(path.name for path in out.glob("*.safetensors"))
    findings.check("folder", len(files) > 0, out.name, "holds no .safetensors file")
    if not indexes:
        loadable = len(files) > 1 or all(name in _SINGLE for name in files)
        findings.check("folder", len(files) <= 1, out.name, f"holds {len(files)} shards and no index")
        findings.check("folder", loadable, ", ".join(files), f"loaders look for {' or '.join(_SINGLE)}")
        return
    findings.check("folder", len(indexes) == 1, out.name, f"holds {len(indexes)} index files, expected one")
    for path in indexes:
        data = read_json(path, findings)
        if data is None:
            continue
        metadata = data.get("metadata")
        weights = as_object(data.get("weight_map"), "folder", f"{path.name}: weight_map", findings)
        if weights is None:
            continue
        shard_of = {name: shard for shard, tensors in headers.items() for name in tensors}
        for name in sorted({*shard_of, *weights}):
            fault = f"the index says {weights.get(name)!r}, the shards say {shard_of.get(name)!r}"
            findings.check("folder", shard_of.get(name) == weights.get(name), f"{path.name}: {name}", fault)
        for name in files:
            findings.check("folder", name in weights.values(), name, f"is not listed in {path.name}; remove it")
        size = sum(stored.size for tensors in headers.values() for stored in tensors.values())
        total_size = metadata.get("total_size") if isinstance(metadata, dict) else None
        fault = f"says {total_size}, the tensors take {size} bytes"
        findings.check("folder", total_size == size, f"{path.name}: metadata.total_size", fault)
