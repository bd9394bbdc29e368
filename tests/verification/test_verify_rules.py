"""The rules of the proof one by one: files, relations between tensors, the job, and how findings are said."""

import ast
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from packed_samples import GLOBAL, Sample, make, raw, sha

import qkit.verification.verify
from qkit.commands.verify import verify_command
from qkit.errors import BadCheckpoint, VerifyFailure
from qkit.verification.decode import decode, read_header
from qkit.verification.fused_layers import fused_groups
from qkit.verification.record import Findings, read_record
from qkit.verification.verify import summary, verify

Q0 = "model.layers.0.self_attn.q_proj"
FILE = "model.safetensors"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def said(out, job=None):
    return [str(problem) for problem in verify(out, job).problems]


def rehash(sample: Sample, out):
    """qkit.json as a forger would write it: with the hashes of the files as they are now."""
    sample.record["shards"] = {path.name: sha(path.read_bytes()) for path in out.glob("*.safetensors")}
    sample.write_json(out)


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000, -1])
@pytest.mark.parametrize("forged", [False, True])
def test_truncated_file(out, keep, forged):
    sample = make("int4")
    sample.write(out)
    (out / FILE).write_bytes((out / FILE).read_bytes()[:keep])
    if forged:
        rehash(sample, out)
    lines = said(out)
    assert any(line.startswith(f"{FILE}: not a sound safetensors file") for line in lines)
    (gathered,) = (line for line in lines if "missing" in line)
    assert gathered.startswith(f"{FILE}: ") and "tensors are missing that may have been in it" in gathered


def test_a_missing_tensor_is_named_where_every_file_can_be_read(out):
    sample = make("sharded")
    del next(s for s in sample.shards.values() if f"{Q0}.weight_scale" in s)[f"{Q0}.weight_scale"]
    sample.write(out)
    assert any(line.startswith(f"{Q0}.weight_scale: is missing, expected ") for line in said(out))


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda d: d["weight_map"].pop(f"{Q0}.weight_scale"), f"{INDEX}: {Q0}.weight_scale: the index says None"),
        (lambda d: d["weight_map"].update({f"{Q0}.weight_scale": SECOND}), "the index says 'model-00002"),
        (lambda d: d["weight_map"].update({"old.weight": FIRST}), "old.weight: the index says"),
        (lambda d: d["weight_map"].update({"x": "../../etc/passwd"}), "x: the index says '../../etc/passwd'"),
        (lambda d: d["metadata"].update(total_size=1), "total_size: says 1, the tensors take"),
        (lambda d: d.pop("metadata"), "total_size: says None"),
        (lambda d: d.pop("weight_map"), "weight_map: expected an object"),
    ],
)
def test_stale_index(out, edit, expected):
    make("sharded").write(out)
    index = json.loads((out / INDEX).read_text())
    edit(index)
    (out / INDEX).write_text(json.dumps(index))
    assert any(expected in line for line in said(out))


def test_files_too_many_or_too_few(out):
    sample = make("sharded")
    sample.write(out)
    extra = out / "model.safetensors"  # a single file next to a sharded set: some loaders prefer it
    extra.write_bytes((out / FIRST).read_bytes())
    lines = said(out)
    assert any("model.safetensors: is not listed in qkit.json" in line for line in lines)
    assert any("is also in" in line for line in lines)
    extra.unlink()
    (out / "pytorch_model.bin").write_bytes(b"x")
    assert any("pickle" in line for line in said(out))
    (out / "pytorch_model.bin").unlink()
    (out / SECOND).rename(out.parent / "moved")
    assert any(f"{SECOND}: is listed in qkit.json and not in the folder" in line for line in said(out))
    (out / SECOND).symlink_to(out.parent / "moved")
    assert any("expected a regular file" in line for line in said(out))
    (out / SECOND).unlink()
    (out.parent / "moved").rename(out / SECOND)
    assert said(out) == []
    (out / INDEX).unlink()
    assert any("2 shards and no index" in line for line in said(out))


def test_single_file_under_a_name_no_loader_knows(out):
    sample = make("int4")
    sample.shards = {"weights.safetensors": sample.shards[FILE]}
    sample.write(out)
    assert any("loaders look for model.safetensors" in line for line in said(out))


def test_header_tricks(out):
    """What the safetensors library lets through: a name given twice, and names that steer a terminal."""
    sample = make("int4")
    for text, expected in (('"a":{},"a":{}', "given twice"), ('"\\u001b[2J":{}', "is not acceptable")):
        sample.write(out)
        entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
        header = ("{" + text.replace("{}", entry) + "}").encode()
        (out / FILE).write_bytes(len(header).to_bytes(8, "little") + header)
        rehash(sample, out)
        lines = said(out)
        assert any(expected in line for line in lines) and all(line.isprintable() for line in lines)


NOT_JSON = [
    "",
    "[]",
    "{",
    '{"a": NaN}',
    '{"a": 1e999}',
    '{"a": 1, "a": 1}',
    "[" * 100_000,
    "\xff",
    '{"a": ' + "9" * 5000,
]


@pytest.mark.parametrize("name", ["config.json", "qkit.json"])
@pytest.mark.parametrize("text", NOT_JSON, ids=range(len(NOT_JSON)))
def test_documents_that_are_not_json(out, name, text):
    make("int4").write(out)
    (out / name).write_bytes(text.encode("latin-1"))
    assert any(line.startswith(f"{name}: not sound JSON") for line in said(out))
    (out / name).unlink()
    missing = "not there: if another tool" if name == "qkit.json" else "cannot be read"
    assert any(line.startswith(f"{name}: {missing}") for line in said(out))


def test_newer_record_names_its_writer(out):
    sample = make("int4")
    sample.record |= {"format_version": 3, "qkit_version": "3.1.0"}
    sample.write(out)
    assert any('written by qkit "3.1.0"' in line and "verify with qkit" in line for line in said(out))


def test_not_a_folder(tmp_path):
    with pytest.raises(BadCheckpoint, match="not a folder"):
        verify(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert any("holds no .safetensors" in line for line in said(tmp_path / "empty"))


# --- the config ---------------------------------------------------------------------------------------------------


def group(sample, name="group_0"):
    return sample.config["quantization_config"]["config_groups"][name]


@pytest.mark.parametrize(
    ("name", "edit", "expected"),
    [
        ("int4", lambda q, g: q.update(version="99.0"), "is not a compressed-tensors release"),
        ("int4", lambda q, g: q.update(version="0.19.0"), "qkit.json says 0.20.0"),
        ("int4", lambda q, g: q.update(format="evil"), "found 'evil'"),
        ("int4", lambda q, g: g.update(format="mixed-precision"), "group_0.format: found 'mixed-precision'"),
        ("mixed", lambda q, g: g.update(format=None), "group_0.format: found None"),
        ("int4", lambda q, g: g["weights"].update(actorder="group"), "actorder group"),
        ("int4", lambda q, g: g["weights"].update(group_size=64), "says int4 group 64, and qkit.json says int4"),
        ("int4", lambda q, g: g["weights"].update(num_bits=8), "says int8 group 32"),
        ("int4", lambda q, g: g.update(colour="red"), "unknown key colour"),
        ("int4", lambda q, g: g.update(targets=["re:("]), "expected a list of names"),
        ("int4", lambda q, g: q["ignore"].append("re:.*q_proj"), "is quantized, and ignore lists it"),
        ("int4", lambda q, g: q["ignore"].remove("lm_head"), "does not cover lm_head"),
        ("int4", lambda q, g: q["config_groups"].update(group_1=g), "claimed by group_0, group_1"),
        ("mixed", lambda q, g: g["targets"].append("re:.*up_proj"), "claimed by group_0, group_1"),
        ("mixed", lambda q, g: g.update(targets=["re:.*o_proj$"]), "is claimed by no group"),
        ("mixed", lambda q, g: g["targets"].append("model.embed_tokens"), "unquantized and claimed by group_0"),
        ("int4", lambda q, g: q.update(kv_cache_scheme={"num_bits": 3}), "kv_cache_scheme"),
        ("nvfp4", lambda q, g: g["input_activations"].update(dynamic=True), "expected local"),
    ],
)  # fmt: skip
def test_config_rule(out, name, edit, expected):
    sample = make(name)
    edit(sample.config["quantization_config"], group(sample))
    sample.write(out)
    assert any(expected in line for line in said(out)), said(out)


@pytest.mark.parametrize("actorder", ["weight", "static"])
def test_activation_order_of_today_is_fine(out, actorder):
    sample = make("int4")
    group(sample)["weights"]["actorder"] = actorder
    sample.write(out)
    assert said(out) == []


def test_own_method_has_the_same_rules(out):
    sample = make("int3-asym")
    sample.config["quantization_config"]["quant_method"] = "qkit"
    sample.write(out)
    report = verify(out)
    assert report.ok and {row.engine: row.loads_as is not None for row in report.engines}["qkit"]
    assert all(row.loads_as is None for row in report.engines if row.engine != "qkit")


def test_w4a8_may_not_take_a_byte_per_weight(out):
    make("w4a8-bytes").write(out)
    assert len(said(out)) == 1 and "use pack-quantized" in said(out)[0]


# --- values that no hash covers -----------------------------------------------------------------------------------


def forge(sample: Sample, out, changed: dict[str, torch.Tensor]):
    """Writes a sample whose hashes all agree with changed tensors, so that only a rule can object."""
    sample.shards[FILE].update(changed)
    for name in set(changed) & set(sample.record["plain"]):
        sample.record["plain"][name]["sha256"] = sha(raw(changed[name]))
    sample.write(out)
    record, stored = read_record(out, Findings()), read_header(out / FILE)
    for name in {key.rpartition(".")[0] for key in changed} & set(record.linears):
        tensors = {k.rpartition(".")[2]: v for k, v in stored.items() if k.rpartition(".")[0] == name}
        sample.record["linears"][name]["weight_sha256"] = decode(record.linears[name], tensors).sha256
    sample.write_json(out)


@pytest.mark.parametrize(
    ("name", "suffix", "value", "expected"),
    [
        ("int4", "weight_scale", lambda t: t * 0, "zero, expected"),
        ("int4", "weight_scale", lambda t: t * float("nan"), "NaN or infinite"),
        ("int4", "weight_scale", lambda t: torch.full_like(t, 3e38), "decoded weights are NaN or infinite"),
        ("int4", "weight_shape", lambda t: t.flip(0) * 2, "holds [128, 128], expected [64, 64]"),
        ("mxfp4", "weight_scale", lambda t: torch.full_like(t, 255), "NaN or infinite"),
        ("nvfp4", "weight_global_scale", lambda t: -t, "zero or negative"),
        ("nvfp4", "weight_global_scale", lambda t: t * 2, "weight_global_scale differs within a fused group"),
        ("nvfp4", "input_global_scale", lambda t: t * 2, "input_global_scale differs within a fused group"),
        ("nvfp4", "weight_scale", lambda t: (t.float() * 0).to(t.dtype), "zero or negative"),
        ("fp8-static", "input_scale", lambda t: t * 0, "zero or negative"),
        ("fp8-channel", "weight", lambda t: torch.full_like(t, float("nan")), "NaN codes"),
    ],
)
def test_impossible_value_under_a_matching_hash(out, name, suffix, value, expected):
    sample = make(name)
    tensor = sample.shards[FILE][f"{Q0}.{suffix}"]
    forge(sample, out, {f"{Q0}.{suffix}": value(tensor)})
    assert any(expected in line for line in said(out)), said(out)
    assert not any("intended" in line for line in said(out))


def test_plain_tensor_with_nan_under_a_matching_hash(out):
    sample = make("int4")
    name = "model.layers.0.self_attn.q_proj.bias"
    forge(sample, out, {name: torch.full_like(sample.shards[FILE][name], float("inf"))})
    assert said(out) == [f"{FILE}: {name}: holds 64 values that are NaN or infinite"]


# --- relations ----------------------------------------------------------------------------------------------------


def test_fused_groups_are_derived_from_names_too():
    names = ["a.q_proj", "a.k_proj", "a.v_proj", "a.o_proj", "m.gate_proj", "m.up_proj", "e.0.w1", "e.0.w3", "e.0.w2"]
    assert fused_groups(names) == [
        ["a.q_proj", "a.k_proj", "a.v_proj"],
        ["e.0.w1", "e.0.w3"],
        ["m.gate_proj", "m.up_proj"],
    ]
    assert fused_groups(["d.encoder_attn.q_proj", "d.encoder_attn.k_proj", "x.q_proj"]) == []
    for cross in ("cross_attn", "cross_attention", "crossattention", "encoder_attention"):
        assert fused_groups([f"d.{cross}.{p}_proj" for p in "qkv"]) == []
    assert fused_groups([f"encoder.attention.{p}_proj" for p in "qkv"])


def test_fused_group_left_out_of_the_record(out):
    sample = make("int4")
    del sample.record["fused"][0]
    sample.write(out)
    assert said(out) == [
        "qkit.json: fused: does not list "
        + ", ".join(f"model.layers.0.self_attn.{p}_proj" for p in "qkv")
        + " as one group"
    ]


def test_mixed_formats_in_a_fused_group(out):
    sample = make("mixed")
    donor = make("fp8-channel")
    other = {k: v for k, v in sample.shards[FILE].items() if not k.startswith(f"{Q0}.weight")}
    sample.shards = {FILE: other | {k: v for k, v in donor.shards[FILE].items() if k.startswith(f"{Q0}.weight")}}
    sample.record["linears"][Q0] = donor.record["linears"][Q0]
    group(sample)["targets"] = [r"re:.*0\.self_attn\.[kv]_proj$", r"re:.*1\.self_attn\.[qkv]_proj$"]
    group(sample, "group_1")["targets"].append(Q0)
    sample.write(out)
    lines = said(out)
    assert any("the weight formats differ" in line for line in lines)
    assert any("the activation formats differ" in line for line in lines)


def test_half_skipped_fused_group(out):
    sample = make("int4")
    del sample.record["linears"][Q0]
    weight = torch.zeros(64, 64)
    sample.shards[FILE] = {k: v for k, v in sample.shards[FILE].items() if not k.startswith(f"{Q0}.weight")}
    sample.shards[FILE][f"{Q0}.weight"] = weight
    sample.record["plain"][f"{Q0}.weight"] = {"dtype": "F32", "shape": [64, 64], "sha256": sha(raw(weight))}
    sample.record["skipped"][Q0] = "sensitive"
    sample.config["quantization_config"]["ignore"].append(Q0)
    sample.write(out)
    assert {line.rpartition(": ")[2] for line in said(out)} == {
        "only some of a fused group are quantized; engines need all or none"
    }
    del sample.record["skipped"][Q0]
    sample.write(out)
    assert any("neither quantized nor among the skipped" in line for line in said(out))


def test_tied_tensor_stored_twice(out):
    sample = make("int4")
    head = sample.shards[FILE]["model.embed_tokens.weight"].clone()
    sample.shards[FILE]["lm_head.weight"] = head
    sample.write(out)
    assert any(line.startswith("lm_head.weight: is stored although it is tied") for line in said(out))
    sample.record["plain"]["lm_head.weight"] = dict(sample.record["plain"]["model.embed_tokens.weight"])
    sample.record["tied"] = []
    sample.write(out)
    assert said(out) == []  # some classes have both, whatever their config says of tying
    sample.config["tie_word_embeddings"] = False
    sample.write(out)
    assert said(out) == []


# --- the job ------------------------------------------------------------------------------------------------------


def test_job(out, tmp_path):
    sample, job = make("int4"), tmp_path / "job"
    sample.write(out)
    with pytest.raises(BadCheckpoint, match=r"journal\.jsonl: no such journal"):
        verify(out, job)
    job.mkdir()
    done = {name: {"weight_sha256": entry["weight_sha256"]} for name, entry in sample.record["linears"].items()}
    first = {name: {"weight_sha256": "0" * 64} for name in done}  # a block that was done again
    lines = [json.dumps({"linears": first}), json.dumps({"block": 0}), json.dumps({"linears": done})]
    (job / "journal.jsonl").write_text("\n".join(lines) + "\n" + '{"linears": {"torn')
    assert said(out, job) == []
    for edit, expected in (
        ({Q0: {"weight_sha256": "1" * 64}}, f"{Q0}: the decoded weight is not the one that the job committed"),
        ({"extra": {"weight_sha256": "1" * 64}}, "extra: is in only one"),
        ({Q0: {}}, "line 4: is damaged"),
        ({Q0: {"weight_sha256": 7}}, "a hash is malformed"),
    ):
        (job / "journal.jsonl").write_text("\n".join([*lines, json.dumps({"linears": edit})]) + "\n")
        assert any(expected in line for line in said(out, job))
    (job / "journal.jsonl").write_text(json.dumps({"linears": {k: v for k, v in done.items() if k != Q0}}) + "\n")
    assert said(out, job) == [f"{Q0}: is in only one of the checkpoint and the job: missing from journal.jsonl"]


# --- how it is said -----------------------------------------------------------------------------------------------


def test_all_problems_are_reported(out):
    sample = make("int4")
    for layer in range(2):
        del sample.shards[FILE][f"model.layers.{layer}.mlp.up_proj.weight_scale"]
    sample.config["quantization_config"]["version"] = "99.0"
    sample.write(out)
    report = verify(out)
    assert len(report.problems) == 3 and summary(report).endswith("(and 2 more)")


def test_command(out, tmp_path):
    sample = make("nvfp4")
    sample.write(out)
    run = CliRunner().invoke(verify_command, [str(out), "--json", str(tmp_path / "report.json")])
    assert run.exit_code == 0 and "sound: 10 quantized linears" in run.output
    assert json.loads((tmp_path / "report.json").read_text())["checks"]["weights"] == 10
    for name in [key for key in sample.shards[FILE] if key.endswith("weight_scale")]:
        sample.shards[FILE][name + "\x1b[31m[red]"] = GLOBAL.clone()
        del sample.shards[FILE][name]
    sample.write(out)
    run = CliRunner().invoke(verify_command, [str(out), "--json", str(tmp_path / "report.json")])
    assert isinstance(run.exception, VerifyFailure) and "NOT sound" in run.output and "\x1b[31m" not in run.output
    problems = json.loads((tmp_path / "report.json").read_text())["problems"]
    assert str(len(problems) - 1) in str(run.exception)


def test_independent_of_the_writer():
    """The proof imports nothing of qkit but the errors, and neither torch nor compressed-tensors."""
    folder = Path(qkit.verification.verify.__file__).parent
    proof = sorted(path for path in folder.glob("*.py") if path.stem != "__init__")
    assert len(proof) >= 11
    system = [folder.parent / "system" / f"{name}.py" for name in ("patterns", "confined")]
    allowed = {"qkit.errors", *(f"qkit.{path.parent.name}.{path.stem}" for path in (*proof, *system))}
    for path in (*proof, *system):
        tree = ast.parse(path.read_text())
        names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        assert {name for name in names if name and name.startswith("qkit")} <= allowed
        assert not {"torch", "compressed_tensors"} & {name.partition(".")[0] for name in names if name}
