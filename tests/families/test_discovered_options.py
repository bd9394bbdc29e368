"""Every option on models that nobody declared: what it does to transposed weights, shared tables and models without a loss."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qkit
from qkit.errors import Unsupported, UsageError
from qkit.evaluation.measure import measure
from qkit.evaluation.request import EvalRequest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import sweep_configs

ROWS = dict(samples=4, seqlen=32, threads=1)
TOKENS = torch.randint(5, 4000, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model of a class of transformers, made once."""
    root = tmp_path_factory.mktemp("models")

    def make(name, kind="causal"):
        folder = root / name.replace(":", "_")
        return folder if folder.exists() else sweep_configs.save(kind, name, folder)

    return make


def difference(out, model) -> float:
    """Between the logits of a result and those of its model, relative."""
    packed, plain = (qkit.load(path, dtype=torch.float32) for path in (out, model))
    with torch.no_grad():
        a, b = packed(TOKENS).logits, plain(TOKENS).logits
    assert a.isfinite().all()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("scheme", ["w8a8", "fp8_dynamic", "mxfp8a16"])
def test_transposed_weights_whose_codes_keep_the_name(scheme, saved, tmp_path):
    """GPT-2 stores [in, out], and these formats store codes [out, in] as 'weight', too; a square one fits both ways."""
    model = saved("gpt2")
    qkit.quantize(model, out=tmp_path / "out", scheme=scheme, method="rtn", threads=1)
    codes = load_file(tmp_path / "out" / "model.safetensors")
    assert codes["transformer.h.0.attn.c_attn.weight"].shape == (384, 128)
    assert codes["transformer.h.0.attn.c_proj.weight"].shape == (128, 128)
    assert difference(tmp_path / "out", model) < 0.08


def test_a_square_transposed_weight_alone(saved, tmp_path):
    """Taken for what the source stores, its codes would be transposed without a word."""
    model, recipe = saved("gpt2"), tmp_path / "r.yaml"
    skipped = "".join(f'  - match: "*.{n}"\n    skip: kept\n' for n in ("c_attn", "mlp.c_fc", "mlp.c_proj"))
    recipe.write_text(f"scheme: w8a8\nrules:\n{skipped}")
    qkit.quantize(model, out=tmp_path / "out", recipe=recipe, threads=1)
    assert difference(tmp_path / "out", model) < 0.02


@pytest.mark.parametrize(
    "options",
    [
        {"method": "gptq+signround", "options": {"steps": 4}},
        {"method": "gptq+signround", "options": {"steps": 4, "e2e_steps": 2}},
        {"method": "gptq+signround", "options": {"steps": 4, "loss_weighted": True}},
        {"method": "gptq", "significant": 0.5},
        {"method": "gptq", "outliers": 0.5},
        {"method": "gptq", "rank": 2},
        {"method": "gptq", "synthetic_samples": 2},
    ],
    ids=str,
)
def test_transposed_weights_with_every_option(options, saved, tmp_path):
    model = saved("gpt2")
    qkit.quantize(model, out=tmp_path / "out", scheme="w8a16", **ROWS, **options)
    assert difference(tmp_path / "out", model) < 0.02


@pytest.mark.parametrize(
    ("name", "kind"), [("bart:seq2seq", "encoders"), ("bert:masked", "encoders"), ("llama4_text", "causal")]
)
def test_embeddings_that_other_modules_have_or_look_at(name, kind, saved, tmp_path):
    """BART's encoder and decoder look up the same table; BERT's head has a bias of another name; Llama 4 asks the table for its
    device."""
    model = saved(name, kind)
    qkit.quantize(model, out=tmp_path / "out", scheme="w8a16", method="rtn", embeddings="int8", threads=1)
    assert difference(tmp_path / "out", model) < 0.05


def test_a_model_without_heads_of_attention_writes_rows(saved, tmp_path):
    qkit.quantize(
        saved("mamba"), out=tmp_path / "out", scheme="w4a16", method="gptq", synthetic_samples=2, **ROWS
    )  # fmt: skip


def test_inputs_of_the_original_model_where_a_linear_does_not_run(saved, tmp_path):
    """Mamba multiplies by the weight of dt_proj itself."""
    qkit.quantize(
        saved("mamba"), out=tmp_path / "out", scheme="w4a16", method="gptq", options={"compensate": 0.5}, **ROWS
    )
    linears = json.loads((tmp_path / "out" / "qkit.json").read_text())["linears"]
    assert {n.rpartition(".")[2] for n, x in linears.items() if not x["tokens"]} == {"dt_proj"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "gptq", "significant": 0.5}, "--significant needs the loss of a language model"),
        ({"method": "signround", "options": {"loss_weighted": True}}, "needs the loss of a language model"),
        ({"method": "signround", "options": {"e2e_steps": 2}}, "needs the predictions of a language model"),
        ({"method": "gptq", "synthetic_samples": 2}, "does not continue a text"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["bert:masked", "bert:base", "bart:seq2seq"])
def test_a_model_that_predicts_no_next_token_has_no_loss(name, options, words, saved, tmp_path):
    with pytest.raises(Unsupported, match=words):
        qkit.quantize(saved(name, "encoders"), out=tmp_path / "out", scheme="w4a16", **ROWS, **options)


def test_a_model_that_predicts_no_next_token_has_no_perplexity(saved, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The sea was calm, and the ship lay still. " * 20)
    request = EvalRequest(texts=(str(text),), window=32, windows=2)
    folder = shutil.copytree(saved("bert"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_decoder": False}))  # it reads in both directions
    with pytest.raises(UsageError, match="models that predict the next token of a text, and a BertLMHeadModel"):
        measure(folder, None, request)
    with pytest.raises(UsageError, match="BertModel gives is compared with the original model's: add --baseline"):
        measure(saved("bert:base", "encoders"), None, request)


def test_a_method_says_what_it_scales(saved, run):
    """BERT's norms come after what they add, and feed more than linears; its values feed a linear alone. GPT-2's are fused."""
    for name, kind, words in (
        (
            "bert:masked",
            "encoders",
            "awq: 4 of 24 linears are scaled; a scale is folded into a norm or a linear that feeds",
        ),
        ("gpt2", "causal", "awq: 8 of 16 linears are scaled"),
    ):
        _, said, _ = run("plan", "--model", saved(name, kind), "--scheme", "w8a16", "--method", "awq", "--samples", 4)
        assert " ".join(said.split()).count(words) == 1


def test_a_layer_whose_inputs_are_not_seen_is_left_out_where_their_range_is_needed(saved, tmp_path):
    """Mamba's dt_proj with NVFP4 inputs, whose scale is measured."""
    model = saved("mamba")
    qkit.quantize(model, out=tmp_path / "out", scheme="nvfp4", method="rtn", **ROWS)
    record = json.loads((tmp_path / "out" / "qkit.json").read_text())
    left_out = [n for n, why in record["skipped"].items() if "its inputs, which the scheme needs, is not seen" in why]
    assert left_out and all(n.endswith("dt_proj") for n in left_out)
    assert difference(tmp_path / "out", model) < 0.5
