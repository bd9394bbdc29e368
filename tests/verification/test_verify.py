"""The proof of a packed checkpoint: sound ones pass, and every corruption of one is caught.

The samples are packed by the compressed-tensors package and dequantized by it, so that neither the writer nor the
decoder under test decides what is right.
"""

import copy
import json
import re

import numpy as np
import pytest
import torch
from packed_samples import CASES, INT8_TOKEN, SAMPLES, SHAPES, Case, Sample, make, pack, raw, sha
from safetensors.torch import save_file

from qkit.verification.decode import decode, layout, read_header
from qkit.verification.record import RecordedLinear
from qkit.verification.spec import Spec
from qkit.verification.verify import verify

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def samples():
    return {name: make(name) for name in SAMPLES}


# --- sound checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLES)
def test_sound_checkpoint_passes(name, samples, tmp_path):
    samples[name].write(tmp_path / "out")
    report = verify(tmp_path / "out")
    assert report.problems == []
    assert (report.linears, report.skipped, report.ok) == (10, 3, True)
    assert report.checks["weights"] == 10 and min(report.checks.values()) > 0
    assert sum(row.linears for row in report.engines if row.engine == "vLLM") == 10
    assert report.bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert json.loads(json.dumps(report.to_json()))["ok"]


UNITS = {
    **{
        f"int{b}-{strategy}{'' if sym else '-asym'}-{cols}": (
            Case("pack-quantized", "int", b, strategy, 20 if strategy == "group" else None, symmetric=sym), 37, cols
        )
        for b in range(1, 9)
        for strategy, cols in (("group", 100), ("channel", 77))
        for sym in (True, False)
    },
    "int4-tensor": (Case("pack-quantized", "int", 4, "tensor"), 5, 33),
    "int8-asym-channel": (Case("int-quantized", "int", 8, "channel", symmetric=False, acts=INT8_TOKEN), 9, 50),
    "int8-naive-group": (Case("naive-quantized", "int", 8, "group", 10), 9, 50),
    "fp8-naive-tensor": (Case("naive-quantized", "fp8", 8, "tensor"), 9, 50),
    "fp8-block-whole": (Case("float-quantized", "fp8", 8, "block", block=(16, 32)), 48, 96),
    "fp8-one-row": (Case("float-quantized", "fp8", 8, "block", block=(128, 128)), 1, 200),
    "nvfp4": (CASES["nvfp4"], 7, 48),
    "mxfp4": (CASES["mxfp4"], 7, 96),
    "mxfp8": (CASES["mxfp8"], 7, 96),
}  # fmt: skip


def stored_unit(case, rows, columns, path, **changed):
    """One linear on disk: its record, its tensors, and the weight that compressed-tensors reads."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(7)).clamp(-3.9, 3.9)
    stored, reference = pack(case, weight.to(torch.bfloat16))
    save_file({key: changed.get(key, lambda t: t)(value) for key, value in stored.items()}, path / "one.safetensors")
    spec = Spec(**{k: v for k, v in case.record().items() if k != "name"})
    acts = Spec(**{k: v for k, v in case.acts.items() if k != "name"}) if case.acts else None
    return (
        RecordedLinear(name="one", format=spec, activations=acts, shape=(rows, columns), weight_sha256=""),
        read_header(path / "one.safetensors"),
        reference,
    )


@pytest.mark.parametrize("name", UNITS)
def test_decoder_agrees_with_compressed_tensors_bit_for_bit(name, tmp_path, monkeypatch):
    case, rows, columns = UNITS[name]
    monkeypatch.setattr("qkit.verification.decode.CHUNK", 3 * columns)  # several chunks
    linear, tensors, reference = stored_unit(case, rows, columns, tmp_path)
    expected = layout(linear, case.packing)
    assert {k: ((v.dtype,), v.shape) for k, v in tensors.items()} == {
        k: (("BF16",) if len(dtypes) > 1 else dtypes, shape) for k, (dtypes, shape) in expected.items()
    }
    done = decode(linear, tensors)
    assert done.faults == [] and done.sha256 == sha(raw(reference))


def set_top_bit(words):
    words = words.clone()
    words[-1, -1] |= -(2**31)
    return words


def test_codes_out_of_range_and_bits_after_the_last(tmp_path):
    int3 = UNITS["int3-group-asym-100"]
    linear, tensors, _ = stored_unit(*int3, tmp_path, weight_packed=set_top_bit, weight_zero_point=set_top_bit)
    assert {name for name, _ in decode(linear, tensors).faults} == {"weight_packed", "weight_zero_point"}
    narrow = Case("int-quantized", "int", 4, "channel", symmetric=False)
    spoil = {"weight": lambda t: t + 8, "weight_zero_point": lambda t: t * 0 - 9}
    linear, tensors, _ = stored_unit(narrow, 9, 50, tmp_path, **spoil)
    assert dict(decode(linear, tensors).faults) == {
        "weight": "codes are outside [-8, 7] of 4 bits",
        "weight_zero_point": "outside [-8, 7]",
    }


def test_known_words_decode(tmp_path):
    def decoded(codes, bits, words):
        state = {"weight_packed": torch.tensor([words]), "weight_scale": torch.ones(1, 1), "weight_shape": None}
        state["weight_packed"] = torch.tensor(np.array([words], dtype=np.uint32).view(np.int32))
        state["weight_shape"] = torch.tensor([1, len(codes)])
        save_file(state, tmp_path / "w.safetensors")
        spec = Spec(
            kind="int",
            bits=bits,
            strategy="channel",
            group=None,
            block=None,
            symmetric=True,
            scale="model",
            dynamic=False,
        )
        done = decode(
            RecordedLinear(name="w", format=spec, activations=None, shape=(1, len(codes)), weight_sha256=""),
            read_header(tmp_path / "w.safetensors"),
        )
        return not done.faults and done.sha256 == sha(np.array(codes, dtype="<f4").tobytes())

    assert decoded([-8, -7, 0, 7, 1, 2, 3, -1], 4, [0x7BA9F810])
    assert decoded([(i % 8) - 4 for i in range(32)], 3, [0x88FAC688, 0xC688FAC6, 0xFAC688FA])
    assert not decoded([-8, -7, 0, 7, 1, 2, 3], 4, [0x7BA9F810])  # a code after the last one


# --- corrupted tensors --------------------------------------------------------------------------------------------


def corruptions(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every way to spoil one tensor; those that change nothing are left out."""
    if tensor.dtype == torch.uint16:  # which has few operations
        found = corruptions(tensor.view(torch.int16)).items()
        return {name: value.view(torch.uint16) if value.dtype == torch.int16 else value for name, value in found}
    bits, flat = tensor.contiguous().view(torch.uint8), tensor.reshape(-1)
    made = {"zero": torch.zeros_like(tensor), "short": flat[:-1].reshape(-1), "flat": flat.reshape(-1, 1, 1)}
    made["retyped"] = tensor.to(torch.float32 if tensor.dtype != torch.float32 else torch.float64)
    made["bit"] = bits.clone()
    made["bit"].view(-1)[0] ^= 1
    made["bit"] = made["bit"].view(tensor.dtype)
    made["shuffled"] = tensor.flip(0)
    if tensor.is_floating_point():
        made["one nan"], made["all nan"] = bits.clone().view(tensor.dtype), torch.full_like(tensor, float("nan"))
        made["one nan"].view(-1)[-1] = float("nan")
        made["negated"] = (-tensor.float()).to(tensor.dtype)
        if tensor.dtype != torch.float8_e4m3fn:
            made["infinite"] = torch.full_like(tensor, float("inf"))
    else:
        made["negated"], made["all ones"] = -tensor, torch.full_like(tensor, 255 if tensor.dtype == torch.uint8 else -1)
    same = (tensor.dtype, tensor.shape, raw(tensor))
    return {k: v.contiguous() for k, v in made.items() if (v.dtype, v.shape, raw(v.contiguous())) != same}


def spoiled(sample: Sample, shard: str, name: str, value: torch.Tensor | None) -> Sample:
    shards = {key: dict(tensors) for key, tensors in sample.shards.items()}
    if value is None:
        del shards[shard][name]
    else:
        shards[shard][name] = value
    return Sample(shards, sample.config, dict(sample.record))


@pytest.mark.parametrize("name", SAMPLES)
def test_no_corrupted_tensor_survives(name, tmp_path):
    sample, out, survivors, tried = make(name, 2 if name == "sharded" else 1), tmp_path / "out", [], 0
    sample.write(out)
    for shard, tensors in sample.shards.items():
        for tensor, value in tensors.items():
            variants = {"dropped": None, "renamed": None, **corruptions(value)}
            if re.search(r"layers\.1|[kv]_proj|up_proj", tensor):  # their like is spoiled in every way
                variants = {kind: variants[kind] for kind in ("dropped", "bit") if kind in variants}
            for kind, new in variants.items():
                bad = spoiled(sample, shard, tensor, new)
                if kind == "renamed":
                    bad.shards[shard][tensor + "_x"] = value
                bad.write(out)
                tried += 1
                if verify(out).ok:
                    survivors.append(f"{tensor}: {kind}")
            bad.record["shards"] = sample.record["shards"]
            bad.write(out, stale_hashes=True)
            assert any("sha256" in p.what and p.where == shard for p in verify(out).problems)
    assert survivors == [] and tried > 50


@pytest.mark.parametrize("name", SAMPLES)
def test_no_swap_survives(name, samples, tmp_path):
    sample, survivors = samples[name], []
    tensors = {key: value for shard in sample.shards.values() for key, value in shard.items()}
    pairs = [(f"layers.0.{s}.", f"layers.1.{s}.") for s in SHAPES] + [("mlp.gate_proj.", "mlp.up_proj.")]
    pairs += [("layers.0.self_attn.k_proj.", "layers.0.self_attn.v_proj.")]
    for first, second in pairs:
        swapped = {}
        for key, value in tensors.items():
            other = key.replace(first, second) if first in key else key.replace(second, first)
            swapped[key] = tensors[other] if other in tensors and other != key else value
        bad = Sample({k: {t: swapped[t] for t in s} for k, s in sample.shards.items()}, sample.config, sample.record)
        bad.write(tmp_path / "out")
        if verify(tmp_path / "out").ok:
            survivors.append((first, second))
    assert survivors == []


# --- corrupted documents ------------------------------------------------------------------------------------------

HARMLESS = [  # what says nothing about the bytes, or is an equal way to say the same
    r"quantization_config\.(global_compression_ratio|kv_cache_scheme|moe_sparsity_config)( |\.|$)",
    r"quantization_config\.(sparsity_config|transform_config) (deleted|null)",
    r"group_0\.format (deleted|null)",
    r"architectures",
    r"(model_type|dtype|tie_word_embeddings) (deleted|null)",
    r"(format|activations)\.name changed",
    r"plain\.\S+\.input_(global_)?scale deleted",
    r"(solver|fallback|plan_hash|fingerprint|qkit_version) (changed)",
    r"(error|baseline_error|source\.bytes) (changed|null|more)",
    r"(recipe|calibration)",
    r"skipped\.(\S+ changed|lm_head deleted)",
    r"compressed_tensors (deleted|null)",
]


def leaves(node, path=()):
    """Every path in a JSON document, of containers too."""
    if path:
        yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(items):
        yield from leaves(value, (*path, key))


def edits(value):
    if isinstance(value, bool):
        yield "flipped", not value
    elif isinstance(value, int | float):
        yield "more", value + 1
        yield "negative", -1 - value
        yield "a string", "12"
    elif isinstance(value, str):
        yield "changed", value + "x"
    yield "null", None
    yield "a list", [7]
    yield "an object", {"evil": 1}


def edited(document, path, *value):
    document = copy.deepcopy(document)
    node = document
    for key in path[:-1]:
        node = node[key]
    if value:
        node[path[-1]] = value[0]
    else:
        del node[path[-1]]
    return document


def at(document, path):
    for key in path:
        document = document[key]
    return document


@pytest.mark.parametrize(
    ("name", "which"),
    [
        *((name, "config") for name in ("int3-asym", "fp8-block", "nvfp4", "mixed", "sparse")),
        ("nvfp4", "record"),
        ("sparse", "record"),
    ],
)
def test_no_corrupted_field_survives(name, which, tmp_path):
    sample, out = make(name, layers=1), tmp_path / "out"
    sample.write(out)
    document, survivors, tried = getattr(sample, which), [], 0
    for path in leaves(document):
        if "_proj" in str(path[1:2]) and "q_proj" not in str(path[1:2]):
            continue  # one linear stands for its like
        value = at(document, path)
        variants = [(kind, (new,)) for kind, new in edits(value) if new != value]
        deleted = [("deleted", ())] if value is not None else []  # null and nothing are the same
        for kind, new in deleted + variants:
            bad = Sample(sample.shards, sample.config, sample.record)
            setattr(bad, which, edited(document, path, *new))
            bad.write_json(out)
            tried += 1
            said = f"{'.'.join(map(str, path))} {kind}"
            if verify(out).ok and not any(re.search(pattern, said) for pattern in HARMLESS):
                survivors.append(said)
    assert survivors == [] and tried > 100
