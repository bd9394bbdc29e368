"""What a path names: weights to diagnose, or something else, which one sentence refuses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qkit.diagnosis.findings import Findings
from qkit.errors import BadCheckpoint, Unsupported
from qkit.files.checkpoint import Checkpoint
from qkit.files.folder import PICKLES, PIPELINE_INDEX, is_pipeline, list_names
from qkit.files.safefile import open_regular, read_range
from qkit.files.sources.opening import encodings

_SAFETENSORS = (".safetensors", ".safetensors.index.json")
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors")
_FEW = 3  # weights of other shapes that a damaged file of the same model may have
_PART = 0.25  # of the weights; more of other shapes are those of another model
Shapes = Mapping[str, tuple[int, ...]]


def weight_files(path: Path) -> tuple[Path, list[Path]]:
    """The folder or file to diagnose, and its GGUF files; none of them where the weights are in safetensors.

    Raises BadCheckpoint or Unsupported where there are no weights of a model.
    """
    if not path.exists():
        raise BadCheckpoint(f"{path}: there is no such file or folder: check the path")
    if path.is_file() and path.suffix == ".safetensors":
        path = (
            path.resolve().parent if path.is_symlink() and not (path.parent / "config.json").exists() else path.parent
        )
    if path.is_file():
        if path.suffix != ".gguf" and not _begins_as_gguf(path):
            raise BadCheckpoint(f"{path}: it is no weight file: give a model folder, a GGUF file or a safetensors file")
        return path, [path]
    if not path.is_dir():
        raise BadCheckpoint(f"{path}: it is neither a file nor a folder: give a model folder or a GGUF file")
    names = list_names(path)
    adapter = next((name for name in _ADAPTERS if name in names), None)
    if adapter is not None:
        raise Unsupported(
            f"{path}: {adapter} says that this is an adapter (LoRA), which has no quantized weights: give the model that it "
            "was trained on, or merge the two first"
        )
    if is_pipeline(path):
        raise Unsupported(f"{path}: {PIPELINE_INDEX} says that this is a diffusers pipeline: {_parts(path, names)}")
    if any(name.endswith(_SAFETENSORS) for name in names):
        return path, []
    files = [path / name for name in names if name.endswith(".gguf")]
    if files:
        return path, files
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise BadCheckpoint(
            f"{path}: only {pickles[0]}, which can run code when it is read: convert to safetensors first"
        )
    raise BadCheckpoint(f"{path}: the folder has no weights: give a folder with safetensors files or a GGUF file")


def _begins_as_gguf(path: Path) -> bool:
    with open_regular(path) as file:
        return path.stat().st_size >= 4 and read_range(path, file, 0, 4, "the magic") == b"GGUF"


def _parts(folder: Path, names: list[str]) -> str:
    """Which components of a pipeline can be diagnosed."""
    parts = [name for name in names if any((folder / name).glob("*.safetensors"))]
    if not parts:
        return "none of its components has safetensors files: get the complete folder"
    return f"give one of its components: {', '.join(str(folder / name) for name in parts)}"


def note_quantized(original: Checkpoint, findings: Findings) -> None:
    """Warn of an original that is quantized itself."""
    if encodings(original.tensors):
        findings.warn(
            "baseline", str(original.path), "it is quantized itself, so that its own errors are among the differences",
            "the model that the file was made from, in 16 bits where its author gives that", "give it as --baseline", 3,
        )  # fmt: skip


def check_baseline(found: Shapes, original: Checkpoint, where: Path) -> None:
    """Refuses an original that cannot be the model of a file. found: the weights by their names in the original

    Raises Unsupported. Weights of the right shapes and other values are told when they are compared.
    """
    about = f"{original.path}: it is not the model that {where} was made from: "
    advice = "give its original as --baseline, or leave the option out"
    common = {name: shape for name, shape in found.items() if name in original.tensors and len(shape) > 1}
    if not common:
        raise Unsupported(f"{about}it has none of the weights of the file by their names: {advice}")
    other = [name for name, shape in common.items() if tuple(original.tensors[name].shape) != tuple(shape)]
    if len(other) > max(_FEW, _PART * len(common)):
        first = other[0]
        raise Unsupported(
            f"{about}{len(other)} of {len(common)} weights have other shapes there, first {first}, {list(found[first])} in the "
            f"file and {list(original.tensors[first].shape)} there: {advice}"
        )
