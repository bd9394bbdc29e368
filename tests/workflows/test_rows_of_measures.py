"""How many calibration rows a measurement looks at, at the most: the first ones, and fewer where there are fewer."""

from types import SimpleNamespace

import pytest
import torch

from qkit.planning.request import Request
from qkit.workflows import kv_cache, requant
from qkit.workflows.calibration_rows import calibration_of
from qkit.workflows.profile import ProfileRequest
from qkit.workflows.quantize import open_structure


@pytest.fixture
def request_for(tiny, calib):
    """``request_for(samples)``: of a tiny model, with so many rows of 8 tokens."""
    return lambda samples: Request(model=str(tiny("llama")), calib=calib, samples=samples, seqlen=8)


@pytest.mark.parametrize(("samples", "expected"), [(10, 10), (16, 16), (17, 16)])
def test_a_cache_is_measured_on_16_rows(samples, expected, request_for):
    request = request_for(samples)
    structure = open_structure(request.model)
    found = kv_cache.measurement_rows(request, SimpleNamespace(structure=structure))
    assert found.samples == expected
    assert torch.equal(found.tokens, calibration_of(request, structure).tokens[:expected])


@pytest.mark.parametrize(("samples", "expected"), [(10, 10), (32, 32), (40, 32)])
def test_trials_of_requant_are_compared_on_32_rows(samples, expected, request_for):
    rows = calibration_of(request_for(samples), open_structure(request_for(samples).model))
    found = requant.comparison_rows(SimpleNamespace(calibration=rows))
    assert found.samples == expected and torch.equal(found.tokens, rows.tokens[:expected])


def test_a_profile_is_measured_on_32_rows_unless_told_otherwise(request_for):
    def rows(samples: int, **fields) -> int:
        return ProfileRequest(base=request_for(samples), candidates="int4", **fields).measured_rows

    assert (rows(10), rows(32), rows(128), rows(128, rows=64)) == (10, 32, 32, 64)
