"""What makes a job the same job: the plan, and the versions of all that decides the bytes of a result."""

import pytest
from tiny_dits import make_pipeline

from qkit.planning import plan as planning
from qkit.planning.request import Request
from qkit.workflows.quantize import prepare


@pytest.fixture
def other_version(monkeypatch):
    """``other_version(library)``: as if it were another one."""
    real = planning.version

    def go(library: str) -> None:
        monkeypatch.setattr(planning, "version", lambda name: "0" if name == library else real(name))

    return go


@pytest.mark.parametrize("library", ["qkit", "torch", "transformers", "compressed-tensors"])
def test_another_version_is_another_job(library, other_version, tiny):
    plan = prepare(Request(model=str(tiny("llama")), scheme="w4a16", group_size=32)).plan
    before = plan.hash, plan.identity
    other_version(library)
    assert plan.hash != before[0] and plan.identity["plan"] == before[1]["plan"]
    differing = {k for k, v in plan.identity["versions"].items() if v != before[1]["versions"][k]}
    assert differing == {library}


def test_diffusers_counts_for_pipelines_alone(other_version, tiny, tmp_path):
    pytest.importorskip("diffusers", reason="needs diffusers: pip install 'qkit[diffusion]'")
    language = prepare(Request(model=str(tiny("llama")), scheme="w4a16", group_size=32)).plan
    pipeline = prepare(Request(model=str(make_pipeline(tmp_path / "pipe")), scheme="w8a8")).plan
    before = language.hash, pipeline.hash
    other_version("diffusers")
    assert language.hash == before[0] and pipeline.hash != before[1]
