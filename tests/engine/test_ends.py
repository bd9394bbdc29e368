"""Quantized embeddings and output heads: what is stored, verified and loaded, tied and untied, with all that may go wrong."""

import hashlib
import json
import random
import shutil

import pytest
import torch
import transformers
from conftest import Quiet
from decompressed import reference_model
from qkit_kernels import cpu
from qkit_kernels.weight import CodeFormat, Weight
from runs import contents, killed_after
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, logits

import qkit
from qkit.errors import BadRecipe, QkitError, Unsupported, UsageError
from qkit.nn.layers import QuantEmbedding, QuantLinear
from qkit.verification.verify import verify
from qkit.workflows.quantize import Request, prepare, quantize

TABLE = "model.embed_tokens"
TOKENS = torch.arange(7, 7 + 48).view(2, 24) * 31 % VOCABULARY


@pytest.fixture(scope="module")
def model_of(tiny):
    """``model_of(tied)``: a tiny model with or without a head of its own."""
    return lambda tied, family="llama": tiny(family, tie_word_embeddings=tied)


def run(model, out, calib=None, **options):
    """The report, and all stored tensors."""
    base = {"scheme": "w4a16", "group_size": 32, "calib": calib, "samples": 4, "seqlen": 32, "threads": 1}
    report = quantize(Request(model=str(model), **{**base, **options}), out, Quiet())
    return report, load_file(out / "model.safetensors")


CASES = [
    (True, {"embeddings": "int8"}),
    (True, {"embeddings": "int4:32", "head": "int4:32", "method": "gptq"}),
    (False, {"embeddings": "int8"}),
    (False, {"head": "int4"}),
    (False, {"embeddings": "int3:16", "head": "int8", "method": "gptq"}),
    (False, {"embeddings": "int6", "head": "int5:64", "scheme": "w8a8"}),
    (True, {"embeddings": "int4:32", "export": "qkit"}),
]


@pytest.mark.parametrize(
    ("tied", "options"), CASES, ids=[f"{'tied' if t else 'own'}-{'-'.join(o.values())}" for t, o in CASES]
)
def test_packed_is_what_compressed_tensors_reads(model_of, calib, tmp_path, tied, options):
    model, out = model_of(tied), tmp_path / "out"
    report, tensors = run(model, out, calib, **options)
    assert report.ok and verify(out, tmp_path / "out.job").ok
    ends = [TABLE] if tied else [n for n, o in ((TABLE, "embeddings"), ("lm_head", "head")) if o in options]
    for name in ends:
        assert f"{name}.weight_packed" in tensors and f"{name}.weight" not in tensors
    assert not (tied and any(n.startswith("lm_head") for n in tensors))  # stored once
    loaded = qkit.load(out, dtype=torch.float32)
    assert isinstance(loaded.get_input_embeddings(), QuantEmbedding) == (TABLE in ends)
    assert isinstance(loaded.get_output_embeddings(), QuantLinear) == (tied or "lm_head" in ends)
    expected = logits(reference_model(out, model), TOKENS)
    assert torch.allclose(logits(loaded, TOKENS), expected, atol=1e-4 * float(expected.abs().max()))
    if options.get("export") == "qkit":
        stock = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert torch.equal(logits(stock, TOKENS), logits(loaded, TOKENS))


def test_sizes_are_exact_and_the_config_names_both_ends(model_of, tmp_path):
    request = Request(model=str(model_of(False)), scheme="w4a16", group_size=32, embeddings="int8", head="int4:64")
    plan = prepare(request).plan
    _, tensors = run(model_of(False), tmp_path / "out", embeddings="int8", head="int4:64")
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == plan.packed_bytes
    groups = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["config_groups"].values()
    assert [TABLE] in [g["targets"] for g in groups]
    assert ["lm_head"] in [g["targets"] for g in groups] or ["Linear", "lm_head"] in [g["targets"] for g in groups]
    assert {n: p.uses for n, p in plan.ends.items()} == {TABLE: ("embeddings",), "lm_head": ("head",)}


def test_equal_formats_share_a_group_that_names_them(model_of, tmp_path):
    _, _ = run(model_of(True), tmp_path / "out", embeddings="int4:32")
    (group,) = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["config_groups"].values()
    assert group["targets"] == ["Linear", TABLE]  # no engine takes an embedding for a Linear


def test_memory_holds_a_tied_table_once_and_no_full_copy(model_of, tmp_path):
    run(model_of(True), tmp_path / "out", embeddings="int8")
    loaded = qkit.load(tmp_path / "out")
    table, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    rows, width = table.num_embeddings, table.embedding_dim
    assert table.nbytes == 0 and head.nbytes < 1.4 * rows * width
    assert not [p for p in (*loaded.parameters(), *loaded.buffers()) if p.shape == (rows, width)]
    assert loaded.generate(TOKENS[:, :4], max_new_tokens=3, do_sample=False).shape == (2, 7)


@pytest.mark.parametrize("family", ["gemma3", "gpt_neox", "opt", "qwen3_moe"])
def test_families(model_of, calib, tmp_path, family):
    """Gemma multiplies rows by a constant, GPT-NeoX and OPT have other names."""
    tied = family in ("gemma3", "opt")
    report, _ = run(model_of(tied, family), tmp_path / "out", embeddings="int4:32", head="int4:32")
    assert report.ok
    loaded, whole = (
        qkit.load(tmp_path / "out", dtype=torch.float32),
        qkit.load(model_of(tied, family), dtype=torch.float32),
    )
    expected = logits(reference_model(tmp_path / "out", model_of(tied, family)), TOKENS)
    assert torch.allclose(logits(loaded, TOKENS), expected, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(logits(whole, TOKENS), expected, atol=1e-3)


def test_rotation_unties_and_both_are_quantized(model_of, calib, tmp_path):
    report, tensors = run(model_of(True), tmp_path / "out", calib, method="rotate", embeddings="int8", head="int4:32")
    assert report.ok and "lm_head.weight_packed" in tensors and f"{TABLE}.weight_packed" in tensors
    full = logits(transformers.AutoModelForCausalLM.from_pretrained(model_of(True), dtype=torch.float32), TOKENS)
    close = logits(qkit.load(tmp_path / "out", dtype=torch.float32), TOKENS)
    assert torch.nn.functional.cosine_similarity(full.flatten(), close.flatten(), dim=0) > 0.97


@pytest.mark.parametrize("after", [3, 14, 30])
def test_a_killed_run_goes_on_with_the_same_bytes(model_of, calib, tmp_path, after):
    options = {"scheme": "w4a16", "method": "gptq", "group_size": 32, "samples": 4, "seqlen": 32, "threads": 1}
    request = Request(model=str(model_of(False)), calib=calib, embeddings="int8", head="int4:32", **options)
    assert quantize(request, tmp_path / "whole", Quiet()).ok
    killed_after(request, tmp_path / "again", after)
    assert quantize(request, tmp_path / "again", Quiet()).ok
    assert contents(tmp_path / "whole") == contents(tmp_path / "again")


@pytest.mark.parametrize(("ends", "loads"), [({"head": "int8"}, True), ({"embeddings": "int8"}, False)])
def test_stock_transformers_does_what_the_report_says(model_of, calib, tmp_path, ends, loads):
    report, _ = run(model_of(False), tmp_path / "out", calib, method="gptq", **ends)
    stock = [row for row in report.engines if row.engine.startswith("transformers")]
    assert all(row.loads_as for row in stock) == loads
    if not loads:
        with pytest.raises(AttributeError, match="no attribute 'weight'"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        return
    found = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32), TOKENS)
    expected = logits(qkit.load(tmp_path / "out", dtype=torch.float32), TOKENS)
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


def test_the_head_is_solved_with_its_inputs_and_the_blocks_stay_the_same(model_of, calib, tmp_path):
    """A smaller error of logits than by rounding; and the options change no byte of a block."""
    _, plain = run(model_of(False), tmp_path / "none", calib, method="gptq")
    report, solved = run(model_of(False), tmp_path / "out", calib, method="gptq", embeddings="int4:32", head="int4:32")
    assert report.ok and all(torch.equal(t, solved[n]) for n, t in plain.items() if ".layers." in n)
    record = json.loads((tmp_path / "out/qkit.json").read_text())["linears"]["lm_head"]
    assert record["solver"] == "gptq" and record["tokens"] == 4 * 32 and record["error"] < record["baseline_error"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("op", ["bag", "dequantize", "int8pack", "int4pack"])
def test_single_rows_of_every_layout_are_those_of_the_whole(bits, op):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (512, 64), dtype=torch.int8)
    group = None if op == "int8pack" else 32
    weight = Weight(CodeFormat("int", bits, group, True, "float"), codes, torch.ones(512, 1 if group is None else 2))
    if not cpu.supported(op, weight.format, (512, 64), torch.bfloat16):
        pytest.skip("no such layout of these codes")
    index = torch.tensor([0, 511, 255, 256, 7, 7])
    assert torch.equal(cpu.rows_of(cpu.lay_out(op, weight, rows=4), index), codes[index])


# ---- what verify sees ------------------------------------------------------------------------------------------


def resealed(out):
    """The folder with the sums of its shard made anew, as whoever changes a tensor with care would."""
    record, file = json.loads((out / "qkit.json").read_text()), "model.safetensors"
    digest = hashlib.sha256((out / file).read_bytes()).hexdigest()
    record["shards"][file] = record["files"][file] = digest
    record.pop("sum", None)
    (out / "qkit.json").write_text(json.dumps(record))
    return out


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_shape"])
def test_one_changed_value_of_the_table_is_seen(model_of, tmp_path, suffix):
    _, tensors = run(model_of(True), tmp_path / "out", embeddings="int8")
    assert verify(tmp_path / "out").ok
    value = tensors[f"{TABLE}.{suffix}"]
    value.view(-1)[len(value.view(-1)) // 2] += 1
    save_file(tensors, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    problems = [str(p) for p in verify(resealed(tmp_path / "out")).problems]
    assert any(TABLE in p for p in problems), problems


CHANGES = {
    "the table is not named": lambda c, r: c["config_groups"]["group_0"].update(targets=["model.layers.0.mlp.up_proj"]),
    "the table is ignored": lambda c, r: c["ignore"].append(TABLE),
    "another width": lambda c, r: c["config_groups"]["group_0"]["weights"].update(num_bits=4),
    "no use": lambda c, r: r["linears"][TABLE].update(uses=["tables"]),
    "no tie": lambda c, r: r.update(tied=[]),
    "not recorded": lambda c, r: r["linears"].pop(TABLE),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_the_files_say_of_the_table_is_checked(model_of, tmp_path, change):
    run(model_of(True), tmp_path / "out", embeddings="int8")
    config, record = (json.loads((tmp_path / "out" / n).read_text()) for n in ("config.json", "qkit.json"))
    change(config["quantization_config"], record)
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    (tmp_path / "out/qkit.json").write_text(json.dumps(record))
    resealed(tmp_path / "out")
    problems = [str(p) for p in verify(tmp_path / "out").problems if "sha256" not in str(p) and "sum" not in str(p)]
    assert problems


def test_a_table_of_another_shape_is_refused_on_loading(model_of, tmp_path):
    _, tensors = run(model_of(True), tmp_path / "out", embeddings="int8")
    tensors[f"{TABLE}.weight_scale"] = tensors[f"{TABLE}.weight_scale"][:-1].clone()
    save_file(tensors, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QkitError, match=rf"{TABLE}.weight_scale"):
        qkit.load(tmp_path / "out")


# ---- options ---------------------------------------------------------------------------------------------------

WRONG = [
    ("int1", "expected int2 to int8"),
    ("int9", "expected int2 to int8"),
    ("nvfp4", "expected int2 to int8"),
    ("int4:", "a group size behind the colon"),
    ("int4:0", "a group size behind the colon"),
    ("int4:-2", "a group size behind the colon"),
    ("int4:x", "a group size behind the colon"),
    ("", "expected int2 to int8"),
]


@pytest.mark.parametrize("option", ["embeddings", "head"])
@pytest.mark.parametrize(("text", "part"), WRONG)
def test_wrong_formats_are_refused_with_the_option(model_of, option, text, part):
    with pytest.raises((UsageError, BadRecipe), match=f"--{option} {text}.*{part}"):
        prepare(Request(model=str(model_of(True)), scheme="w4a16", **{option: text}))


def test_two_formats_of_one_matrix_are_refused(model_of):
    with pytest.raises(UsageError, match="tied, one matrix for both"):
        prepare(Request(model=str(model_of(True)), scheme="w4a16", embeddings="int8", head="int4"))


def test_strict_refuses_a_group_that_does_not_divide(model_of):
    with pytest.raises(Unsupported, match="not a multiple of the group size 48"):
        prepare(Request(model=str(model_of(True)), scheme="w4a16", group_size=32, embeddings="int4:48", strict=True))


def test_random_texts_of_the_options_never_fail_otherwise(model_of):
    rng, model = random.Random(5), str(model_of(False))
    for _ in range(150):
        text = "".join(rng.choice("int482:-0 x,+%\u00e9\u2167") for _ in range(rng.randint(0, 8)))
        options = {rng.choice(["embeddings", "head"]): rng.choice([text, f"int{text}", f"int4:{text}"])}
        try:
            plan = prepare(Request(model=model, scheme="w4a16", **options)).plan
        except QkitError as e:
            assert "\n" not in str(e)
        else:
            assert len(plan.ends) == 1


def test_a_model_without_the_options_is_as_before(model_of, tmp_path):
    _, tensors = run(model_of(False), tmp_path / "out")
    assert f"{TABLE}.weight" in tensors and "lm_head.weight" in tensors
    assert "uses" not in (tmp_path / "out/qkit.json").read_text()
    shutil.rmtree(tmp_path / "out")
