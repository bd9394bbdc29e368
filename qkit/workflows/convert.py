"""``qkit convert``: a quantized folder in another layout, with the same codes and scales, and the proof of that.

Everything is looked at before anything is written: what the other layout has no place for is refused with the name of the
layer. The result is read back from disk by ``qkit.verification``, which shares no code with the writer: each decoded weight has
to be the one of the source, bit for bit in float32.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkit.engine.partial_output import LISTING, Partial
from qkit.errors import BadCheckpoint, Unsupported, VerifyFailure
from qkit.families.discover import kind_of
from qkit.families.structure import ModelStructure, dtype_of
from qkit.files.card import edited_card
from qkit.files.checkpoint import check_config
from qkit.files.folder import is_pipeline, read_record
from qkit.files.locate import find_model
from qkit.files.output import check_output_dir, commit_dir
from qkit.files.sources.packed import PackedFolder, PackedLinear, open_packed
from qkit.planning.layout import mlx_refusal
from qkit.system.progress import Progress
from qkit.tensor.layouts import mlx
from qkit.tensor.layouts.modelopt import inverse
from qkit.tensor.layouts.table import HALVES, LAYOUTS, lost_scales, refusal, scale_dtype
from qkit.tensor.qtensor import Params, QTensor, dequantize, weight_sha256
from qkit.verification.verify import Report, summary, verify
from qkit.workflows.convert_hints import anew
from qkit.workflows.converted import Found, Target, uses

EXPORTS = ("gptq", "awq", "modelopt", "mlx", "compressed-tensors")


@dataclass(frozen=True)
class Conversion:
    """What was done, and the proof.

    equal: linears whose float32 weights are those of the source bit for bit
    difference: the largest relative one of the others, where a global scale became its reciprocal
    """

    source: str
    export: str
    linears: int
    equal: int
    difference: float
    report: Report

    def to_json(self) -> dict[str, Any]:
        """All fields as a JSON-able dictionary."""
        fields = {"source": self.source, "export": self.export, "linears": self.linears}
        return {**fields, "equal": self.equal, "difference": self.difference, "verification": self.report.to_json()}


def convert(model: str, export: str, out: Path, progress: Progress, overwrite: bool = False) -> Conversion:
    """Write the quantized model in ``model`` to ``out`` in the layout ``export``, of EXPORTS.

    Raises Unsupported with the layer and the reason where the layout has no place for what the source holds; nothing is written
    then. VerifyFailure leaves OUT.partial for inspection.
    """
    folder = find_model(model).resolve()
    if is_pipeline(folder):
        raise Unsupported(f"{folder}: a diffusion pipeline: these layouts are for language models")
    check_output_dir(out, folder, overwrite)
    packed = open_packed(folder, export)
    check_config(packed.checkpoint.config, packed.checkpoint.tensors)
    record = read_record(folder)
    progress.start("read the source", len(packed.linears))
    structure = ModelStructure(packed.checkpoint)
    found, lost = _look(packed, record, export, progress)
    _refuse(packed, structure, found, lost, export)
    target = Target(packed, structure, found, export, record)
    work = out.with_name(out.name + ".convert")
    with suppress(FileExistsError):
        os.mkdir(work)
    try:
        with Partial.claim(out, work) as partial:
            progress.start("write and verify", 2)
            target.write(partial, edited_card(out))
            progress.step()
            report = verify(partial.path)
            progress.step()
            if not report.ok:
                check = "doctor" if record is None else "verify"
                raise VerifyFailure(
                    f"{partial.path}: the result failed its own verification: {summary(report)}: run 'qkit {check} {folder}'; "
                    "if the source is sound, this is a fault of qkit: please report it"
                )
            commit_dir(partial.path, out, overwrite)
        with suppress(FileNotFoundError):
            os.unlink(work / LISTING)
    finally:
        with suppress(OSError):  # what a failed run needs to go on stays
            os.rmdir(work)
    equal = sum(f.difference == 0 for f in found.values())
    return Conversion(packed.method, export, len(found), equal, max(f.difference for f in found.values()), report)


def _look(
    packed: PackedFolder, record: dict[str, Any] | None, export: str, progress: Progress
) -> tuple[dict[str, Found], dict[str, str]]:
    """Reads every linear once: what was seen, and {layout: the first linear whose scales would change in it}.

    Raises VerifyFailure where a result of qkit is not what its record says, and as ``_check_scales``.
    """
    found: dict[str, Found] = {}
    changed: dict[str, str] = {}
    recorded = {} if record is None else record.get("linears", {})
    model = dtype_of(packed.checkpoint)
    for name, linear in packed.linears.items():
        q, static = linear.read(packed.checkpoint)
        _check_scales(packed, linear, q, static, export)
        digest = weight_sha256([q])
        if name in recorded and recorded[name].get("weight_sha256") != digest:
            raise VerifyFailure(
                f"{name}: its weights are not those that qkit.json says: run 'qkit verify' on the folder"
            )
        held, difference = _held(q, export)
        pair = (q.format, linear.kept.activations)
        stored = _scale_dtype(q, static, export, model)
        found[name] = Found(pair, linear.shape, stored, digest if held is q else weight_sha256([held]), difference)
        if q.format.kind == "int":
            _note_lost(changed, name, q, {e: _scale_dtype(q, static, e, model) for e in EXPORTS})
        progress.step()
    return found, changed


def _note_lost(changed: dict[str, str], name: str, q: QTensor, stored: Mapping[str, torch.dtype]) -> None:
    """Adds the layouts in which scales of a weight would change. stored: {layout: the dtype of scales}"""
    was = q.params.scale.dtype
    if "mlx" not in changed and (lost := mlx.lost_biases(q, stored["mlx"])):
        changed["mlx"] = (
            f"{name}: {lost} of its {q.params.scale.numel()} products of zero point and scale, which MLX stores, are numbers "
            f"that {str(stored['mlx'])[6:]} does not have"
        )
    for export, dtype in stored.items():
        if export not in changed and dtype != was and (lost := lost_scales(q, dtype)):
            changed[export] = (
                f"{name}: {lost} of its {q.params.scale.numel()} scales are {str(was)[6:]} numbers that {str(dtype)[6:]}, "
                f"which {LAYOUTS[export].title} stores, does not have"
            )


def _check_scales(packed: PackedFolder, linear: PackedLinear, q: QTensor, static: Tensor | None, export: str) -> None:
    """Raises BadCheckpoint for scales that stand for no number, Unsupported for such as no result of qkit has: 0, or below it.

    A negative scale of integers without zero points only turns their range round.
    """
    name, folder = linear.name, packed.checkpoint.path
    held = {
        "scales of its weights": q.params.scale,
        "global scale": q.params.global_scale,
        "scale of its inputs": static,
    }
    for what, scale in held.items():
        if scale is None or scale.dtype == torch.uint8:  # powers of two
            continue
        values = scale.to(torch.float32)
        if bad := int((~values.isfinite()).sum()):
            raise BadCheckpoint(
                f"{folder}: {name}: {bad} of {values.numel()} values of the {what} are NaN or infinite: get the model again"
            )
        signed = q.format.kind == "int" and q.format.symmetric and scale is q.params.scale
        if bad := int((values == 0 if signed else values <= 0).sum()):
            said = (
                "0, and qkit stores only scales other than 0"
                if signed
                else "0 or less, and qkit stores only scales above 0"
            )
            command = anew(folder, export, {n: x.shape for n, x in packed.linears.items()}, q.format.bits)
            raise Unsupported(
                f"{name}: {bad} of {values.numel()} values of the {what} are {said}: quantize it anew: {command}"
            )
    if not bool(dequantize(q).isfinite().all()):
        raise BadCheckpoint(f"{folder}: {name}: some of its weights are NaN or infinite: get the model again")


def _scale_dtype(q: QTensor, static: Tensor | None, export: str, model: torch.dtype) -> torch.dtype:
    """The dtype in which scales are stored: that of the source where the layout has it; of the model, where compressed-tensors
    gets scales of 32 bits, that of the inputs too, that 16 hold exactly."""
    dtype = q.params.scale.dtype
    if export == "compressed-tensors" and dtype == torch.float32 and not lost_scales(q, model):
        exact = static is None or torch.equal(static.to(model).to(torch.float32), static.to(torch.float32))
        return model if exact else dtype
    if export == "mlx" and q.format.kind == "int":
        halves = [d for d in (dtype, model) if d in HALVES]
        return next((d for d in halves if not lost_scales(q, d) and not mlx.lost_biases(q, d)), torch.float32)
    return scale_dtype(export, q.format, dtype, model)


def _held(q: QTensor, export: str) -> tuple[QTensor, float]:
    """The weight as it comes back from a layout, and how far it is from this one. ModelOpt has the reciprocal of NVFP4's
    global scale, rounded to float32, which gives most numbers back and not all."""
    whole = q.params.global_scale
    back = None if whole is None or export != "modelopt" else inverse(whole.reciprocal())
    if whole is None or back is None or torch.equal(back, whole):
        return q, 0.0
    held = replace(q, params=Params(q.params.scale, None, back))
    a, b = dequantize(q), dequantize(held)
    return held, float(((a - b).abs() / a.abs().clamp_min(torch.finfo(torch.float32).tiny)).max())


def _refuse(
    packed: PackedFolder, structure: ModelStructure, found: Mapping[str, Found], lost: Mapping[str, str], export: str
) -> None:
    """Raises Unsupported for the first thing that a layout has no place for, with what would work."""
    reasons = {e: _reason(packed, structure, found, e) or lost.get(e) for e in EXPORTS}
    if reasons[export] is None:
        return
    fits = [e for e in EXPORTS if reasons[e] is None]
    shapes = {name: f.shape for name, f in found.items() if "embeddings" not in uses(structure, name)}
    bits = max(f.pair[0].bits for f in found.values())
    raise Unsupported(
        f"--export {export}: {reasons[export]}. As it is, the model fits --export {' and '.join(fits)}; quantized anew, better "
        f"from its original, it fits {export}: {anew(packed.checkpoint.path, export, shapes, bits)}"
    )


def _reason(packed: PackedFolder, structure: ModelStructure, found: Mapping[str, Found], export: str) -> str | None:
    """Why a layout has no place for a model, the dtype of its scales apart; None where it has."""
    if export not in LAYOUTS:
        return None
    layout = LAYOUTS[export]
    ends = [name for name in found if "embeddings" in uses(structure, name)]
    pairs = {name: f.pair for name, f in found.items()}
    reason = refusal(layout, pairs, {name: f.shape for name, f in found.items()}, ends)
    if reason is None and export == "mlx":
        reason = mlx_refusal(pairs, kind_of(packed.checkpoint.config))
    if reason is not None or not packed.cache:
        return reason
    first = next(iter(packed.cache))
    if not layout.cache:
        return f"{first}: {layout.title} has no place for the scales of an FP8 KV cache"
    if first.rpartition(".")[2] not in ("k_scale", "v_scale") or packed.cache[first].nbytes > 4:
        return f"{first}: {layout.title} has one scale for the keys and one for the values of a layer"
    return None
