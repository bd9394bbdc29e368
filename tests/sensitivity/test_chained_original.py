"""Measures with one block of the model in memory: the figures of the whole model in memory, and which models run that way."""

import pytest
import tiny_models
import torch
import transformers

from qkit.engine import chain
from qkit.files.owned import TEMP_PREFIX
from qkit.sensitivity import measurement
from qkit.sensitivity.chained_original import ChainedOriginal
from qkit.sensitivity.names import BLOCKWISE
from qkit.sensitivity.original import WholeOriginal
from qkit.sensitivity.profile import Profile
from qkit.workflows.profile import ProfileRequest, plan_measurement, profile
from qkit.workflows.quantize import Request

KINDS = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "gemma3": {},  # multiplies its embeddings
    "opt": {},  # adds positions to them
    "mixtral": {},  # has experts in one tensor
    "gpt_neox": {},
    "qwen3_moe": {},
}


@pytest.fixture
def kinds_used(monkeypatch):
    """The classes that measured, in order."""
    found = []
    run = measurement.run_measure
    monkeypatch.setattr(
        measurement, "run_measure", lambda context, name: (found.append(type(context.original)), run(context, name))[1]
    )
    return found


CANDIDATES = {
    "ends too": ("w4a16,bf16", {"embeddings": "auto", "head": "auto"}),
    "quantized inputs": ("w4a16,w8a8,bf16", {}),
}


def measured(model, folder, progress, measures, candidates, rows=4, **options):
    request = Request(model=str(model), method="rtn", samples=4, seqlen=32, **options)
    return profile(ProfileRequest(request, candidates, measures, rows=rows), folder, progress)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CANDIDATES)
def test_a_chain_measures_what_the_whole_model_does(kind, case, tiny, tmp_path, quiet, kinds_used):
    model = tiny(kind.partition(",")[0], **KINDS[kind])
    candidates, options = CANDIDATES[case]
    chained = measured(model, tmp_path / "chained", quiet, BLOCKWISE, candidates, **options)
    assert set(kinds_used) == {ChainedOriginal}
    whole = measured(model, tmp_path / "whole", quiet, (*BLOCKWISE, "loss"), candidates, **options)
    assert kinds_used[-1] is WholeOriginal
    agree(chained, whole)


def agree(chained, whole):
    """Every figure is equal, but for the order of sums in float32."""
    assert chained.base_loss == pytest.approx(whole.base_loss, rel=1e-5)
    assert chained.whole.keys() == whole.whole.keys()
    for name, found in chained.whole.items():
        assert found == pytest.approx(whole.whole[name], rel=2e-3, abs=1e-6)
    assert [u.key for u in chained.units] == [u.key for u in whole.units]
    for unit, other in zip(chained.units, whole.units, strict=True):
        for name, choice in unit.choices.items():
            expected = {m: other.choices[name].costs[m] for m in BLOCKWISE}
            assert choice.costs == pytest.approx(expected, rel=2e-3, abs=1e-9), (unit.key, name)


def test_types_of_gguf(tmp_path, quiet):
    """Of tiny-llama, which is trained and tied; its ends are units too."""
    common = ("tiny-llama", quiet, "q3_k,q4_k,q8_0")
    found = [
        measured(common[0], tmp_path / str(i), common[1], measures, common[2])
        for i, measures in enumerate((BLOCKWISE, (*BLOCKWISE, "kl")))
    ]
    agree(*found)
    assert found[0].units[-1].choices["Q4_K"].costs["fisher"] > 0


def test_nothing_depends_on_the_workers(tiny, tmp_path, quiet):
    one, three = (
        measured(tiny("llama"), tmp_path / str(n), quiet, BLOCKWISE, "w4a16,bf16", embeddings="auto", threads=n)
        for n in (1, 3)
    )
    assert one == three


def test_embeddings_that_are_more_than_looked_up_need_the_whole_model(tmp_path, quiet, kinds_used):
    """Granite multiplies them outside of their module."""
    model = tmp_path / "granite"
    config = transformers.GraniteConfig(**tiny_models.FAMILIES["llama"][1], embedding_multiplier=12.0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(model)
    tiny_models.add_tokenizer(model)
    measured(model, tmp_path / "a", quiet, ("fisher",), "w4a16,bf16")
    measured(model, tmp_path / "b", quiet, ("fisher",), "w4a16,bf16", embeddings="auto")
    assert kinds_used == [ChainedOriginal, WholeOriginal]


def test_a_model_that_turns_out_to_be_no_chain_is_measured_whole(tiny, tmp_path, quiet, kinds_used, monkeypatch):
    """Its rows do not stay in the folder of the profile."""
    monkeypatch.setattr(chain, "_is_proved", lambda *_: False)
    measured(tiny("llama"), tmp_path, quiet, ("fisher",), "w4a16,bf16")
    assert kinds_used == [WholeOriginal]
    assert not list(tmp_path.rglob(f"{TEMP_PREFIX}*"))


def test_a_plan_of_a_profile_is_measured_that_way_too(tiny, tmp_path, quiet):
    measured(tiny("llama"), tmp_path, quiet, ("fisher",), "w4a16,w8a8")
    known = Profile.load(tmp_path)
    base = Request(model=str(tiny("llama")), method="rtn", samples=4, seqlen=32)
    with plan_measurement(base, known, tmp_path, quiet) as divergence:
        everything = divergence({u.key: "W4A16" for u in known.units})
        nothing = divergence({})
    assert everything == pytest.approx(known.whole["W4A16"]["kl"], rel=1e-6)
    assert nothing == pytest.approx(0.0, abs=1e-9)
