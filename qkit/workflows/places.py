"""The folders of a run, looked at before a model is read: this file imports no torch, so that a wrong place is told at once."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qkit.errors import QkitError, UsageError
from qkit.files.folder import RECORD, list_names, read_record, weights_folder
from qkit.files.job_folder import refuse_foreign
from qkit.files.locate import find_model
from qkit.files.output import check_output_dir
from qkit.planning.quality import names_method
from qkit.planning.request import is_requant, recipe_of
from qkit.sensitivity.names import MEASURED

if TYPE_CHECKING:
    from qkit.workflows.options import QuantizeOptions

_DECIDED_LATER: tuple[str, ...] = ("targets",)  # of a recipe, what measurements may add to


def check_places(model: str, out: Path, work: Path | None, overwrite: bool) -> None:
    """Refuse folders that a run could not use, before anything is measured for it.

    A result of qkit in OUT passes: whether it is that of the same command is known later. Raises as ``check_output_dir`` and
    ``refuse_foreign``.
    """
    source = find_model(model).resolve()
    if overwrite or not (weights_folder(out) / RECORD).is_file():
        check_output_dir(out, source, overwrite)
    work = work or out.with_name(out.name + ".job")
    if work.resolve() == out.resolve():
        raise UsageError(f"{work}: the job folder is the output folder: use another --work")
    if source in (work.resolve(), *work.resolve().parents):
        raise UsageError(f"{work}: the job folder lies inside the model folder: use another --work")
    refuse_foreign(work)


def check_profile_folder(folder: Path) -> None:
    """Raises UsageError for a folder with something in it that is not a profile's."""
    if folder.is_dir() and list_names(folder) and not (folder / MEASURED).is_file():
        raise UsageError(
            f"{folder}: it is not empty and holds no {MEASURED}, so it is not a profile: use another folder"
        )
    if os.path.lexists(folder) and not folder.is_dir():
        raise UsageError(f"{folder}: a profile is a folder, and this is a file or a link: use another name")


def check_result_there(options: QuantizeOptions, out: Path, overwrite: bool) -> None:
    """Raises UsageError for a result in OUT that other settings made, where the options say all settings: a budget and requant
    measure them first."""
    try:
        record = None if overwrite else read_record(weights_folder(out))
    except QkitError as e:
        raise UsageError(
            f"{out}: the output folder is not empty, and its {RECORD} cannot be read: choose another folder"
        ) from e
    if record is None or options.budget is not None or is_requant(options.request.method):
        return
    request, later = options.request, _DECIDED_LATER
    if not names_method(request):
        request, later = replace(request, options={}, effort=None), (*later, "method", "options")
    asked = {**json.loads(json.dumps(recipe_of(request).model_dump())), "seed": request.seed}
    held = {**(found if isinstance(found := record.get("recipe"), dict) else {}), "seed": record.get("seed")}
    other = [name for name in asked if name not in later and asked[name] != held.get(name)]
    if other:
        raise UsageError(
            f"{out}: the output folder is not empty: it holds a result of other settings ({', '.join(other)}): choose another, "
            "or add --overwrite to replace it"
        )
