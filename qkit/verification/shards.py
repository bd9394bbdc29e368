"""The set of files with the packed weights of a folder: shards and their index, and the tensors in them.

Part of the independent proof (see ``verify.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qkit.errors import BadCheckpoint
from qkit.verification.decode import Stored, read_header
from qkit.verification.files import sha256_of
from qkit.verification.record import Findings, Record, as_object, read_json

_SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")  # names a loader looks for without an index
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


def read_folder(out: Path, record: Record | None, findings: Findings) -> dict[str, dict[str, Stored]]:
    """The tensors of every shard that can be read, after checks of the set of files."""
    headers: dict[str, dict[str, Stored]] = {}
    for path in sorted(out.iterdir()):
        stale = path.suffix in _PICKLES
        findings.check(
            "folder", not stale, path.name, "weights in a pickle format do not belong in a packed checkpoint"
        )
        if path.suffix != ".safetensors":
            continue
        if not findings.check("folder", path.is_file() and not path.is_symlink(), path.name, "expected a regular file"):
            continue
        if record is not None:
            said = record.shards.get(path.name)
            if findings.check("folder", said is not None, path.name, "is not listed in qkit.json; remove it"):
                what = "its sha256 is not the one in qkit.json: the file changed after the export"
                findings.check("folder", sha256_of(path) == said, path.name, what)
        try:
            headers[path.name] = read_header(path)
        except BadCheckpoint as error:
            where, _, what = str(error).partition(": ")
            findings.check("folder", False, where, what)
    for name in record.shards if record else ():
        there = name in headers or (Path(name).name == name and (out / name).is_file())
        findings.check("folder", there, name, "is listed in qkit.json and not in the folder")
    _check_twice(headers, findings)
    _check_index(out, headers, findings)
    return headers


def _check_twice(headers: Mapping[str, Mapping[str, Stored]], findings: Findings) -> None:
    seen: dict[str, str] = {}
    for shard, tensors in headers.items():
        for name in tensors:
            first = seen.setdefault(name, shard)
            findings.check("folder", first == shard, f"{shard}: {name}", f"is also in {first}")


def _check_index(out: Path, headers: Mapping[str, Mapping[str, Stored]], findings: Findings) -> None:
    indexes = sorted(out.glob("*.safetensors.index.json"))
    files = sorted(path.name for path in out.glob("*.safetensors"))
    findings.check("folder", len(files) > 0, out.name, "holds no .safetensors file")
    if not indexes:
        lone = len(files) > 1 or all(name in _SINGLE for name in files)
        findings.check("folder", len(files) <= 1, out.name, f"holds {len(files)} shards and no index")
        findings.check("folder", lone, ", ".join(files), f"loaders look for {' or '.join(_SINGLE)}")
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
        there = {name: shard for shard, tensors in headers.items() for name in tensors}
        for name in sorted({*there, *weights}):
            what = f"the index says {weights.get(name)!r}, the shards say {there.get(name)!r}"
            findings.check("folder", there.get(name) == weights.get(name), f"{path.name}: {name}", what)
        for name in files:
            findings.check("folder", name in weights.values(), name, f"is not listed in {path.name}; remove it")
        size = sum(stored.size for tensors in headers.values() for stored in tensors.values())
        said = metadata.get("total_size") if isinstance(metadata, dict) else None
        what = f"says {said}, the tensors take {size} bytes"
        findings.check("folder", said == size, f"{path.name}: metadata.total_size", what)
