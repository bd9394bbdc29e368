"""Attention and feed-forward beside each other, reading the same norm: every layer is solved on what it reads."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import Quiet

from qkit.workflows.quantize import Request, quantize

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import sweep_configs


@pytest.mark.parametrize("family", ["codegen", "gptj"])
def test_every_layer_has_inputs(family: str, tmp_path: Path) -> None:
    sweep_configs.save("causal", family, tmp_path / "source")
    options = {"compensate": 0.5, "sweeps": 1}
    request = Request(
        model=str(tmp_path / "source"), scheme="w4a16", method="gptq", options=options, samples=8, seqlen=32, threads=1
    )
    assert quantize(request, tmp_path / "out", Quiet()).ok
    linears = json.loads((tmp_path / "out" / "qkit.json").read_text())["linears"]
    assert {x["tokens"] for x in linears.values()} == {8 * 32}
