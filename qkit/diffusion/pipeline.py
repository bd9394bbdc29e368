"""Pipelines of diffusers: a folder of components under a model_index.json, of which the transformer is quantized.

The rest (text encoders, VAE, scheduler, tokenizers) is copied byte for byte. Components may come from diffusers and
transformers only, and no file of code or pickle is copied: a pipeline is read, not believed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qkit.checkpoint import sampled_hash
from qkit.errors import BadCheckpoint, Unsupported, write_failure
from qkit.folder import DENOISER, PICKLES, PIPELINE_INDEX, RECORD, contained, list_names, load_json
from qkit.safefile import sha256_file, shown, sync_dir, write_atomic

LIBRARIES = ("diffusers", "transformers")
FORMAT_VERSION = 1
WHOLE = 1 << 20  # bytes of a file up to which a fingerprint reads all of it
_CODE = (".py", ".so", ".pyc")
SECOND = "transformer_2"
SAMPLING = "sampling.json"  # beside the index: how the pipeline is meant to be called, and prompts


def check_pipeline(folder: Path) -> dict[str, Any]:
    """model_index.json, after checks. Raises BadCheckpoint for what would run code or is no pipeline, Unsupported for one
    without a diffusion transformer."""
    file = folder / PIPELINE_INDEX
    index = load_json(contained(folder.resolve(), PIPELINE_INDEX), "pipeline index")
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise BadCheckpoint(f"{file}: _class_name is missing or not a name: get the pipeline again from its source")
    settings = (str, int, float, bool, type(None))
    components = {k: v for k, v in index.items() if not k.startswith("_") and not isinstance(v, settings)}
    for name, value in components.items():
        if value == [None, None]:
            continue
        pair = isinstance(value, list) and len(value) == 2
        sound = pair and value[0] in LIBRARIES and isinstance(value[1], str) and value[1].isidentifier()
        if not sound or not re.fullmatch(r"[a-z0-9_]+", name):
            raise BadCheckpoint(
                f"{file}: component {shown(name)} is {shown(value)}, expected a class of {' or '.join(LIBRARIES)}: code inside "
                "a pipeline is never run"
            )
    there = {name for name, value in components.items() if value != [None, None]}
    if DENOISER not in there:
        unet = "unet" in there
        raise Unsupported(
            f"{folder}: a {index['_class_name']} "
            + ("with a U-Net" if unet else "without a transformer")
            + f" (its components: {', '.join(sorted(there)) or 'none'}): qkit quantizes pipelines with a diffusion transformer"
        )
    if SECOND in there:
        raise Unsupported(
            f"{folder}: a pipeline with two transformers ({DENOISER}, {SECOND}): give each by itself, --model "
            f"{folder}/{DENOISER} and --model {folder}/{SECOND}"
        )
    return index


def rest_of(source: Path) -> list[str]:
    """Files of the pipeline that are copied: its index and its components, but for the transformer, code and pickles.

    Raises BadCheckpoint for a component with weights in a pickle only, or a file that leads out of the folder.
    """
    names = [PIPELINE_INDEX, *(name for name in (SAMPLING,) if (source / name).is_file())]
    index = check_pipeline(source)
    root = source.resolve()
    for component in sorted(k for k, v in index.items() if isinstance(v, list) and k != DENOISER):
        if not (source / component).is_dir():
            continue
        files = _files(source / component)
        weights = [f for f in files if f.endswith(".safetensors")]
        pickles = [f for f in files if f.endswith(PICKLES)]
        if pickles and not weights:
            raise BadCheckpoint(
                f"{source / component}: only {shown(pickles[0])}, which can run code when it is read: convert it to safetensors"
            )
        names += [f"{component}/{f}" for f in files if not f.endswith((*PICKLES, *_CODE))]
    for name in names:
        contained(root, name)
    return names


def fingerprint_of(source: Path) -> str:
    """sha256 over the files of ``rest_of``, of large ones over samples."""
    digest = hashlib.sha256()
    for name in rest_of(source):
        file = source / name
        size = file.stat().st_size
        content = sha256_file(file) if size <= WHOLE else sampled_hash(file, 8, size)
        digest.update(f"{name}\0{size}\0{content}\0".encode())
    return digest.hexdigest()


def rest_places(source: Path, replaced: Mapping[str, Path]) -> dict[str, Path]:
    """{name in the output: file} of everything of ``rest_of``. replaced: by component, the folder to take in the place of its
    own. Raises as ``rest_of``."""
    root = source.resolve()
    places = {name: contained(root, name) for name in rest_of(source) if name.partition("/")[0] not in replaced}
    return places | {f"{name}/{file}": folder / file for name, folder in replaced.items() for file in _files(folder)}


def copy_rest(places: Mapping[str, Path], out: Path, made: str, sampling: bytes | None = None) -> None:
    """Copy files to ``out``, and write the record of what was copied. places: of ``rest_places``; sampling: what the result's
    sampling.json says, in the place of the source's. Raises IOFailure."""
    digests: dict[str, str] = {}
    try:
        for name, place in places.items():
            target = out / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(place, target)
            digests[name] = sha256_file(target)
            sync_dir(target.parent)
        if sampling is not None:
            write_atomic(out / SAMPLING, sampling)
            digests[SAMPLING] = sha256_file(out / SAMPLING)
    except OSError as e:
        raise write_failure(out, e) from e
    record = {"format_version": FORMAT_VERSION, "qkit_version": made, "pipeline": DENOISER, "files": digests}
    write_atomic(out / RECORD, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())


def _files(folder: Path) -> list[str]:
    """Names of all files below a folder, relative to it, sorted."""
    found: list[str] = []
    for name in list_names(folder):
        path = folder / name
        found += [f"{name}/{f}" for f in _files(path)] if path.is_dir() else [name]
    return found


def reason(error: Exception) -> str:
    """The first line of another library's complaint, or its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def quiet() -> Iterator[None]:
    """What diffusers and transformers say about the ordinary is not said: bars of loading, hints, rounded arguments."""
    import diffusers.utils.logging
    import transformers.utils.logging

    logs: tuple[Any, ...] = (diffusers.utils.logging, transformers.utils.logging)
    before = [(log.is_progress_bar_enabled(), log.get_verbosity()) for log in logs]
    try:
        for log in logs:
            log.disable_progress_bar()
            log.set_verbosity_error()
        yield
    finally:
        for log, (bars, verbosity) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()


def load_pipeline(folder: Path, dtype: Any, device: str) -> Any:
    """A diffusers pipeline whose quantized linears stay packed; text encoders and VAE in ``dtype`` too."""
    from diffusers import DiffusionPipeline

    check_pipeline(folder)
    try:
        with quiet():
            found = DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
    except (
        OSError,
        ValueError,
        ImportError,
        AttributeError,
        TypeError,
        LookupError,
        RuntimeError,
        SafetensorError,
    ) as e:
        raise BadCheckpoint(f"{folder}: diffusers cannot load it: {reason(e)}") from e
    return found.to(device)


def load_denoiser(folder: Path, name: str, dtype: Any, device: str) -> Any:
    """A diffusion transformer in eval mode. name: its class in diffusers."""
    import diffusers

    with quiet():
        found = getattr(diffusers, name).from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True
        )
    return found.eval().to(device)
