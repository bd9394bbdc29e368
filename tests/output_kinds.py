"""Tiny outputs of several kinds, for tests of what may happen to them afterwards."""

from collections.abc import Callable
from pathlib import Path

import qkit_data
import tiny_dits
import tiny_models
import tiny_vlms
from conftest import Quiet

from qkit.kvcache.policy import parse
from qkit.planning.request import Request
from qkit.workflows.quantize import quantize

SMALL = dict(num_hidden_layers=1, vocab_size=256)


def _text(work: Path) -> Path:
    file = work / "calib.txt"
    file.write_text(qkit_data.text_path("calibration").read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return file


def _w4a16(work: Path) -> Request:
    model = tiny_models.make("llama", work / "model", **SMALL)
    (model / "LICENSE").write_text("as is\n")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}\n")
    return Request(model=str(model), scheme="w4a16", group_size=32, threads=1, kv=parse("kivi2").to_json())


def _calibrated(scheme: str, kv: str | None = None) -> Callable[[Path], Request]:
    def make(work: Path) -> Request:
        model = tiny_models.make("llama", work / "model", num_hidden_layers=1)
        cache = None if kv is None else parse(kv).to_json()
        rows = dict(calib=_text(work), samples=4, seqlen=32)
        return Request(model=str(model), scheme=scheme, threads=1, kv=cache, **rows)

    return make


def _laid_out(scheme: str, export: str, group: int | None = None) -> Callable[[Path], Request]:
    def make(work: Path) -> Request:
        model = tiny_models.make("llama", work / "model", **SMALL)
        return Request(model=str(model), scheme=scheme, group_size=group, export=export, threads=1)

    return make


def _vlm(work: Path) -> Request:
    model = tiny_vlms.make("llava", work / "model")
    tiny_vlms.add_processor(model)
    return Request(model=str(model), scheme="w8a8", targets={"vision": "skip"}, threads=1)


def _pipeline(work: Path) -> Request:
    return Request(model=str(tiny_dits.make_pipeline(work / "model")), scheme="w8a8", threads=1)


KINDS: dict[str, Callable[[Path], Request]] = {
    "w4a16 with a packed cache": _w4a16,
    "nvfp4": _calibrated("nvfp4"),
    "w8a8 with an fp8 cache": _calibrated("w8a8", "fp8"),
    "w4a16 as gptq": _laid_out("w4a16", "gptq", 32),
    "w4a16 as awq": _laid_out("w4a16_asym", "awq", 32),
    "w4a16 as mlx": _laid_out("w4a16", "mlx", 32),
    "nvfp4 as modelopt": _laid_out("nvfp4a16", "modelopt"),
    "vision-language w8a8": _vlm,
    "pipeline w8a8": _pipeline,
}


def make(kind: str, work: Path) -> Path:
    """The output folder of that kind, made in ``work``."""
    work.mkdir(parents=True, exist_ok=True)
    quantize(KINDS[kind](work), work / "out", Quiet())
    return work / "out"
