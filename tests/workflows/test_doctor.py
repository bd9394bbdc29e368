"""``qkit doctor``: seeded defects are found and named, sound files of several writers have no finding."""

import json
import shutil
from pathlib import Path

import pytest
import quantized_sources as sources
import seeded_defects as defects
import seeded_gguf
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from seeded_experts import expert_seeds
from seeded_files import Q, Seed, field, tensors

from qkit.diagnosis.findings import NOTE
from qkit.diagnosis.sidefiles import template_fault
from qkit.diagnosis.words import names_layer
from qkit.workflows.api import quantize
from qkit.workflows.doctor import diagnose

GROUPS = {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": True, "type": "int"}
NVFP4 = {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, "symmetric": True, "type": "float"}
EXPERTS = "model.layers.0.block_sparse_moe.experts"


@pytest.fixture(scope="session")
def doctor_base(tmp_path_factory) -> Path:
    """A plain model of three layers, wide enough for statements about codes."""
    folder = tiny_models.make("llama", tmp_path_factory.mktemp("base") / "model", hidden_size=128, num_hidden_layers=3)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    return folder


@pytest.fixture(scope="session")
def sound_files(tmp_path_factory, doctor_base) -> dict[str, tuple[Path, Path]]:
    """{name: (sound file, its original)} of several writers."""
    work = tmp_path_factory.mktemp("sound")
    moe = tiny_models.make("mixtral", work / "moe", intermediate_size=64)
    made = {
        "int4": sources.compressed(doctor_base, work / "int4", {**GROUPS, "group_size": 32}, "pack-quantized")[0],
        "nvfp4": sources.compressed(doctor_base, work / "nvfp4", NVFP4, "nvfp4-pack-quantized")[0],
        "gptq": sources.gptq(doctor_base, work / "gptq", sym=True)[0],
        "ordered": sources.gptq(doctor_base, work / "ordered", act_order=True)[0],
        "awq": sources.awq(doctor_base, work / "awq")[0],
        "fp8": sources.fp8(doctor_base, work / "fp8")[0],
    }
    for scheme in ("q4_0", "w8a8"):
        quantize(model=str(doctor_base), scheme=scheme, out=str(work / scheme))
        made[scheme] = work / scheme
    quantize(model=str(moe), scheme="w4a16", group_size=32, out=str(work / "experts"))
    return {**{name: (folder, doctor_base) for name, folder in made.items()}, "experts": (work / "experts", moe)}


@pytest.mark.parametrize("name", ["int4", "gptq", "ordered", "awq", "fp8", "q4_0", "w8a8", "experts"])
@pytest.mark.parametrize("with_base", [False, True], ids=["alone", "baseline"])
def test_a_sound_file_has_no_finding(name, with_base, sound_files):
    folder, base = sound_files[name]
    found = diagnose(folder, base if with_base else None)
    assert [f for f in found.findings if f.level != NOTE] == [] and found.sound
    assert sum(count for count, _ in found.formats.values()) > 0
    assert bool(found.drift) is with_base


PLANNED = {
    "int4": defects.compressed_seeds,
    "gptq": defects.gptq_seeds,
    "ordered": lambda base: defects.ordered_seeds(),
    "awq": lambda base: defects.awq_seeds(),
    "fp8": defects.fp8_seeds,
    "q4_0": lambda base: seeded_gguf.gguf_seeds(),
    "experts": lambda base: expert_seeds(base, EXPERTS, ("w1", "w2", "w3")),
}
CASES = [(name, i) for name, make in PLANNED.items() for i in range(len(make(Path())))]
IDS = [f"{name}: {PLANNED[name](Path())[i].name}" for name, i in CASES]


@pytest.mark.parametrize(("name", "index"), CASES, ids=IDS)
def test_a_seeded_defect_is_found(name, index, sound_files, tmp_path):
    folder, base = sound_files[name]
    seed: Seed = PLANNED[name](base)[index]
    copy = tmp_path / "seeded"
    shutil.copytree(folder, copy)
    seed.edit(copy)
    found = diagnose(copy, base if seed.baseline else None, seed.engine)
    hits = [f for f in found.findings if f.kind in seed.kinds and any(seed.where in x for x in f.layers)]
    assert [f for f in hits if f.level != NOTE], [f.to_json() for f in found.findings]
    assert all(f.found and f.expected and f.advice for f in hits if f.level != NOTE)


@pytest.mark.parametrize("name", ["w8a8", "q4_0"])
def test_bytes_that_changed_are_told_by_the_sums_in_the_record(name, sound_files, tmp_path):
    """Codes are any number, so that nothing else tells."""
    copy = shutil.copytree(sound_files[name][0], tmp_path / "copy")
    file = next(f for f in copy.iterdir() if f.suffix in (".safetensors", ".gguf"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # of the last layer
    file.write_bytes(content)
    (copy / "README.md").write_text("mine")
    (copy / "generation_config.json").write_text("{}")
    findings = diagnose(copy).findings
    found = [(f.level, f.layers) for f in findings if f.kind == "changed bytes"]
    assert ("fault", (file.name,)) in found and ("note", ("generation_config.json",)) in found
    named = [layers for level, layers in found if level == "fault" and layers != (file.name,)]
    assert len(found) == 2 + len(named) and len(named) == (name == "w8a8")  # GGUF's blocks go by other names
    record = json.loads((copy / "qkit.json").read_text())
    for sums in ({}, {"files": [], "shards": 1}, {"files": {"../x": "0" * 64}, "shards": {"a/b": 1}}):
        (copy / "qkit.json").write_text(json.dumps({**record, "files": {}, "shards": {}, **sums}))
        assert "changed bytes" not in {f.kind for f in diagnose(copy).findings}


def test_global_scales_of_fused_layers(sound_files):
    found = diagnose(sound_files["nvfp4"][0])  # the compressor gives each linear one of its own
    assert {f.kind for f in found.findings if f.level != NOTE} == {"fused layers"}


def test_one_group_that_is_a_whole_row_is_like_the_other_groups(tmp_path):
    """Of experts whose inner width is one group."""
    moe = tiny_models.make("qwen3_moe", tmp_path / "moe", moe_intermediate_size=32)
    quantize(model=str(moe), scheme="w4a16", group_size=32, out=str(tmp_path / "out"))
    assert [f for f in diagnose(tmp_path / "out", moe).findings if f.level != NOTE] == []


def test_the_worst_finding_is_first(sound_files, tmp_path):
    copy = tmp_path / "seeded"
    shutil.copytree(sound_files["int4"][0], copy)
    field("temperature", 0.1, file="generation_config.json")(copy)
    tensors(lambda t: t.pop(f"{Q}.weight_scale"))(copy)
    found = diagnose(copy, sound_files["int4"][1])
    assert [f.level for f in found.findings] == sorted(
        (f.level for f in found.findings), key="fault warning note".split().index
    )
    assert found.findings[0].kind == "lost tensors" and not found.sound


def test_a_fold_is_no_drift(doctor_base, tmp_path):
    """A norm that is divided, and linears whose columns are multiplied, compute the same."""
    folded = tmp_path / "folded"
    shutil.copytree(doctor_base, folded)
    found = load_file(folded / "model.safetensors")
    factor = torch.linspace(0.5, 2, 128)
    found["model.layers.1.input_layernorm.weight"] = (
        found["model.layers.1.input_layernorm.weight"] / factor
    ).bfloat16()
    for leaf in "qkv":
        name = f"model.layers.1.self_attn.{leaf}_proj.weight"
        found[name] = (found[name] * factor).bfloat16()
    save_file(found, folded / "model.safetensors", {"format": "pt"})
    source, _ = sources.compressed(folded, tmp_path / "made", {**GROUPS, "group_size": 32}, "pack-quantized")
    assert [f for f in diagnose(source, doctor_base).findings if f.level != NOTE] == []
    norm = "model.layers.1.input_layernorm.weight"
    original = load_file(doctor_base / "model.safetensors")[norm]
    tensors(lambda t: t.__setitem__(norm, original))(source)
    assert {f.kind for f in diagnose(source, doctor_base).findings if f.level == "fault"} == {"drift"}


def _copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def _faults(folder: Path, **asked) -> list[tuple[str, str]]:
    return [(f.kind, f.layers[0]) for f in diagnose(folder, **asked).findings if f.level != NOTE]


def test_tied_tensors_that_differ(sound_files, tmp_path):
    copy = _copy(sound_files["int4"][0], tmp_path / "tied")
    field("tie_word_embeddings", True)(copy)
    assert ("config", "lm_head.weight") in _faults(copy)
    name = "model.embed_tokens.weight"
    tensors(lambda t: t.__setitem__("lm_head.weight", t[name].clone()))(copy)
    assert _faults(copy) == []


def test_an_engine_that_reads_other_files(sound_files):
    assert _faults(sound_files["int4"][0], engine="llama.cpp") == [("engine", "source")]


@pytest.mark.parametrize(
    ("name", "engine", "loads"), [("gptq", "vllm", True), ("ordered", "vllm", False), ("awq", "transformers", True)]
)
def test_engines_of_other_layouts(name, engine, loads, sound_files):
    """vLLM loads GPTQ without zero points alone."""
    assert {kind for kind, _ in _faults(sound_files[name][0], engine=engine)} == (set() if loads else {"engine"})


def test_scales_of_zero_under_weights_of_zero(sound_files, tmp_path):
    """A row of padding is no fault."""
    copy = _copy(sound_files["fp8"][0], tmp_path / "zero")

    def change(t):
        t[f"{Q}.weight"].view(torch.uint8)[:32] = 0
        t[f"{Q}.weight_scale_inv"][0] = 0

    tensors(change)(copy)
    assert _faults(copy) == []


@pytest.mark.parametrize(
    ("entry", "name", "expected"),
    [
        ("gate", "model.layers.0.mlp.gate", True),
        ("gate", "model.layers.0.mlp.experts.0.gate_proj", False),
        ("mlp", "model.layers.0.mlp.gate_proj", True),
        ("model.layers.1", "model.layers.10.mlp.up_proj", False),
        ("*.mlp.*", "model.layers.10.mlp.up_proj", True),
        ("", "lm_head", False),
    ],
)
def test_names_in_lists(entry, name, expected):
    assert names_layer(entry, name) is expected


@pytest.mark.parametrize("text", ["{% for m in x %}{{ m }}", "{{ a.b( }}", "{% endif %}"])
def test_a_template_that_cannot_be_parsed(text):
    assert template_fault(text)


def test_a_template_of_transformers():
    assert (
        template_fault("{% for m in x %}{% generation %}{{ m }}{% endgeneration %}{% continue %}{% endfor %}") is None
    )


def test_the_command(sound_files, tmp_path, run):
    folder, base = sound_files["int4"]
    code, out, _ = run("doctor", folder, "--baseline", base, "--json", tmp_path / "doctor.json")
    said = json.loads((tmp_path / "doctor.json").read_text())
    assert code == 0 and "sound: 0 faults" in out and said["sound"] and said["method"] == "compressed-tensors"
    errors = [line["error"] for line in said["drift"]]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.01
    copy = tmp_path / "seeded"
    shutil.copytree(folder, copy)
    tensors(lambda t: t.pop(f"{Q}.weight_scale"))(copy)
    code, out, err = run("doctor", copy, "--json", tmp_path / "doctor.json")
    said = json.loads((tmp_path / "doctor.json").read_text())
    assert code == 4 and "weight_scale" in err and len(err.strip().splitlines()) == 1
    assert Q in out and "what to do" in out and not said["sound"] and said["findings"][0]["layers"] == [Q]


def test_a_name_in_the_hub_cache(sound_files, tmp_path, run, monkeypatch):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    shutil.copytree(sound_files["int4"][0], snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    code, out, _ = run("doctor", "owner/name")
    assert code == 0 and "sound" in out
    code, _, err = run("doctor", "owner/other")
    assert code == 3 and "owner/other" in err


def test_nothing_to_look_at(tmp_path, run):
    for path in (tmp_path / "no", tmp_path):
        code, _, err = run("doctor", path)
        assert code in (3, 4) and len(err.strip().splitlines()) == 1 and err.startswith("qkit: ")
