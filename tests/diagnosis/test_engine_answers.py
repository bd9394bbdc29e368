"""What ``qkit doctor`` says of engines is what ``qkit verify`` says of the same file."""

import shutil

import pytest
from seeded_files import field

from qkit.diagnosis.findings import FAULT, NOTE, WARNING
from qkit.verification.model_engines import engine_lines
from qkit.verification.verify import verify
from qkit.workflows.doctor import diagnose

TITLES = {"vllm": "vLLM", "transformers": "transformers", "llama.cpp": "llama.cpp"}
CACHE = {"samples": 4, "seqlen": 32}
FILES = {
    "q4_k": ("q4_k", {}),
    "gguf_nvfp4": ("gguf_nvfp4", {}),
    "w4a16": ("w4a16", {}),
    "kv nvfp4": ("w4a16", {"kv": "nvfp4", **CACHE}),
    "kv fp8_head": ("w4a16", {"kv": "fp8_head", **CACHE}),
    "w4a16_asym": ("w4a16_asym", {}),
    "fp8_dynamic": ("fp8_dynamic", {}),
    "gptq": ("w4a16_asym", {"export": "gptq"}),
    "modelopt": ("nvfp4", {"export": "modelopt", **CACHE}),
    "mlx": ("w4a16", {"export": "mlx", "group_size": 32}),
    "mlx asym": ("w4a16_asym", {"export": "mlx", "group_size": 32}),
    "qkit": ("w4a16", {"export": "qkit"}),
    "head": ("w4a16", {"head": "int8"}),
}


@pytest.mark.parametrize("name", FILES)
def test_the_answers_are_those_of_verify(name, made):
    scheme, options = FILES[name]
    folder = made(scheme, **options)
    report = verify(folder)
    assert report.ok and report.engines
    rows = {(r.engine, r.weights, r.activations, r.packing, r.loads_as, r.limits, r.linears) for r in report.engines}
    keys = ("engine", "weights", "activations", "packing", "loads_as", "limits", "linears")
    assert {tuple(row[k] for k in keys) for row in diagnose(folder).engines} == rows
    for line in engine_lines(report.engines):
        for engine, title in TITLES.items():
            if line.engine.startswith(title):
                found = diagnose(folder, engine=engine)
                refused = [f for f in found.findings if f.kind == "engine" and f.level == FAULT]
                assert bool(refused) is not line.loads and found.faulty is not line.loads
                assert len(found.answers) == 1 and all(note in found.answers[0] for note in line.notes)


def test_the_cache_that_vllm_refuses_is_a_warning_without_an_engine(made):
    found = diagnose(made("w4a16", kv="nvfp4", **CACHE))
    (warning,) = [f for f in found.findings if f.kind == "engine"]
    assert warning.level == WARNING and "NVFP4 scales of a KV cache" in warning.found and found.sound


def test_a_format_that_no_table_has_is_not_passed_over(made, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made("w4a16"), copy)
    field("quantization_config", {"quant_method": "new"})(copy)
    found = diagnose(copy, engine="vllm")
    assert any(f.kind == "engine" and f.level == WARNING and "does not know" in f.found for f in found.findings)


def test_without_an_engine_a_gguf_file_is_not_judged(made):
    assert [f for f in diagnose(made("q4_k")).findings if f.level != NOTE] == []
