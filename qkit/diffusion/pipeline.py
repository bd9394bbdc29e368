"""Pipelines of diffusers: a folder of components with a model_index.json. The transformer is quantized.

The rest (text encoders, VAE, scheduler, tokenizers) is copied unchanged. Only components of diffusers and transformers are
accepted, and no code or pickle file is copied: a pipeline is not trusted.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qkit.errors import BadCheckpoint, Unsupported, write_failure
from qkit.files.folder import DENOISER, PIPELINE_INDEX, checked_path, list_names, load_json
from qkit.files.hash_cache import cached_sha256
from qkit.files.safefile import sha256_file, shown, write_atomic
from qkit.files.side_files import copy_side_files, hash_side_files, refuse_pickles
from qkit.system.extras import needs

LIBRARIES = ("diffusers", "transformers")
SECOND = "transformer_2"  # Wan 2.2: the transformer of the later steps
UNET = "unet"
DENOISERS = (DENOISER, SECOND, UNET)
SAMPLING = "sampling.json"  # beside the index: arguments of the pipeline, and prompts


def check_pipeline(folder: Path, component: str = DENOISER) -> dict[str, Any]:
    """Content of model_index.json, after checks. component: the one that is quantized, or sampled for.

    Raises BadCheckpoint for a folder that would run code or is no pipeline, Unsupported for one without that component.
    """
    file = folder / PIPELINE_INDEX
    index = load_json(checked_path(folder.resolve(), PIPELINE_INDEX), "pipeline index")
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise BadCheckpoint(f"{file}: _class_name is missing or not a name: get the pipeline again from its source")
    settings = (str, int, float, bool, type(None))
    components = {k: v for k, v in index.items() if not k.startswith("_") and not isinstance(v, settings)}
    for name, value in components.items():
        if value == [None, None]:
            continue
        is_pair = isinstance(value, list) and len(value) == 2
        sound = is_pair and value[0] in LIBRARIES and isinstance(value[1], str) and value[1].isidentifier()
        if not sound or not re.fullmatch(r"[a-z0-9_]+", name):
            raise BadCheckpoint(
                f"{file}: component {shown(name)} is {shown(value)}, expected a class of {' or '.join(LIBRARIES)}: code inside "
                "a pipeline is never run"
            )
    present = {name for name, value in components.items() if value != [None, None]}
    if component not in present:
        unet = component == DENOISER and UNET in present
        raise Unsupported(
            f"{folder}: a {index['_class_name']} "
            + ("with a U-Net" if unet else f"without a {component}")
            + f" (its components: {', '.join(sorted(present)) or 'none'}): qkit quantizes pipelines with "
            "a diffusion transformer" + (f"; its U-Net is quantized by itself: --model {folder / UNET}" if unet else "")
        )
    return index


def files_around(source: Path) -> dict[str, str]:
    """{name: digest} of the files of the pipeline that are copied: all but the transformer, code, pickles and, outside the
    components, weights (``side_files.hash_side_files``).

    Raises BadCheckpoint for a component with weights in a pickle only, and as ``hash_side_files``.
    """
    index = check_pipeline(source)
    components = sorted(k for k, v in index.items() if isinstance(v, list) and k != DENOISER)
    for component in components:
        if (source / component).is_dir():
            refuse_pickles(source / component)
    return hash_side_files(source.resolve(), components, (DENOISER,))


def hash_weights_around(source: Path, rest: Iterable[str]) -> str:
    """sha256 of all weights among the files of ``files_around``, in hex (``hash_cache``)."""
    names = sorted(name for name in rest if name.endswith(".safetensors"))
    return hashlib.sha256("".join(f"{name}\0{cached_sha256(source / name)}\0" for name in names).encode()).hexdigest()


def rest_names(files: Mapping[str, str], replaced: Mapping[str, Path]) -> list[str]:
    """Names of the files that ``copy_rest`` writes, relative to the pipeline."""
    copied = [name for name in files if name.partition("/")[0] not in replaced]
    return [*copied, *(f"{name}/{file}" for name, folder in replaced.items() for file in _files(folder)), SAMPLING]


def copy_rest(
    source: Path,
    out: Path,
    files: Mapping[str, str],
    sampling: bytes | None = None,
    replaced: Mapping[str, Path] | None = None,
) -> dict[str, str]:
    """Copy the files of ``wanted``, which ``files_around`` gave, to ``out``, and give their {name: sha256}.

    sampling: content of sampling.json in place of the source's; replaced: {component: folder to copy in place of its own}.
    Raises IOFailure, and BadCheckpoint for a file that changed.
    """
    replacements = replaced or {}
    copied_files = {name: known for name, known in files.items() if name.partition("/")[0] not in replacements}
    hashes = copy_side_files(source.resolve(), out, copied_files)
    try:
        for component, folder in replacements.items():
            for file in _files(folder):
                target = out / component / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / file, target)
                hashes[f"{component}/{file}"] = sha256_file(folder / file)
    except OSError as e:
        raise write_failure(out, e) from e
    if sampling is not None:
        write_atomic(out / SAMPLING, sampling)
        hashes[SAMPLING] = hashlib.sha256(sampling).hexdigest()
    return hashes


def _files(folder: Path) -> list[str]:
    """Names of all files below a folder, relative to it, sorted."""
    names: list[str] = []
    for name in list_names(folder):
        path = folder / name
        names += [f"{name}/{f}" for f in _files(path)] if path.is_dir() else [name]
    return names


def reason(error: Exception) -> str:
    """The first line of a library's error message, or the error's class where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars, hints and warnings of diffusers and transformers."""
    with needs("a diffusion pipeline", "diffusion"):
        import diffusers.utils.logging
    import transformers.utils.logging

    logs: tuple[Any, ...] = (diffusers.utils.logging, transformers.utils.logging)
    settings = [(log.is_progress_bar_enabled(), log.get_verbosity()) for log in logs]
    try:
        for log in logs:
            log.disable_progress_bar()
            log.set_verbosity_error()
        yield
    finally:
        for log, (bars, verbosity) in zip(logs, settings, strict=True):
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()


def pipeline_around(folder: Path) -> tuple[Path, str] | None:
    """(The pipeline that a folder is a component of, the component's name); None: it lies alone, or is no denoiser of one."""
    whole = folder.resolve().parent
    name = folder.resolve().name
    return (whole, name) if name in DENOISERS and (whole / PIPELINE_INDEX).is_file() else None


def own_steps(pipeline: Any, component: str) -> int:
    """The number of steps of the schedule in which a pipeline calls that component: all, but for two transformers."""
    times = pipeline.scheduler.timesteps
    ratio = getattr(getattr(pipeline, "config", None), "boundary_ratio", None)
    if ratio is None or getattr(pipeline, SECOND, None) is None or component not in (DENOISER, SECOND):
        return len(times)
    early = int((times >= ratio * pipeline.scheduler.config.num_train_timesteps).sum())
    return early if component == DENOISER else len(times) - early


def load_pipeline(folder: Path, dtype: Any, device: str, component: str = DENOISER) -> Any:
    """A diffusers pipeline whose quantized linears stay packed; text encoders and VAE in ``dtype`` too."""
    with needs("a diffusion pipeline", "diffusion"):
        from diffusers import DiffusionPipeline

    check_pipeline(folder, component)
    try:
        with quiet():
            pipeline = DiffusionPipeline.from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True
            )
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
    return pipeline.to(device)


def load_denoiser(folder: Path, name: str, dtype: Any, device: str) -> Any:
    """A diffusion transformer in eval mode. name: its class in diffusers."""
    with needs("a diffusion transformer", "diffusion"):
        import diffusers

    with quiet():
        model = getattr(diffusers, name).from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True
        )
    return model.eval().to(device)
