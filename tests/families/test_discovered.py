"""Models that nobody declared: their blocks, matrices, names and calls are found in their modules and in a run of them."""

import json
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file

import qkit
from qkit.errors import BadCheckpoint, UsageError
from qkit.families import discover
from qkit.families.norms import norm_offset
from qkit.families.structure import ModelStructure
from qkit.files.checkpoint import Checkpoint
from qkit.workflows.quantize import open_structure

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import sweep_configs

SIZES = dict(vocab_size=4096, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
GPTQ = dict(scheme="w4a16", method="gptq", samples=4, seqlen=32)


def saved(config, folder, cls=transformers.AutoModelForCausalLM):
    """A random model of that config, in bfloat16, with the embedded tokenizer."""
    torch.manual_seed(0)
    model = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.normal_(0.0 if name.endswith("bias") else 1.0, 0.2)
            else:
                p.normal_(0, 0.5 if "emb" in name or "wte" in name else p.shape[-1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_models.add_tokenizer(folder)
    return folder


def gpt_oss(folder):
    config = transformers.GptOssConfig(
        **SIZES, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2, head_dim=16,
        sliding_window=16, layer_types=["sliding_attention", "full_attention"], pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return saved(config, folder)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("gpt_neox", {}),
        ("qwen3_moe", {}),
        ("llama", {"method": "rotate+awq+gptq", "head": "int8"}),
    ],
    ids=["llama", "gpt_neox", "qwen3_moe", "llama-rotate+awq+gptq"],
)
def test_a_declared_family_that_is_hidden_gives_the_same_bytes(family, options, tmp_path, monkeypatch):
    model, options = tiny_models.make(family, tmp_path / "model"), GPTQ | options
    qkit.quantize(model=model, out=tmp_path / "declared", **options)
    monkeypatch.setattr(discover, "DECLARED", ())
    assert open_structure(str(model)).is_discovered
    qkit.quantize(model=model, out=tmp_path / "hidden", **options)
    records = [json.loads((tmp_path / out / "qkit.json").read_text()) for out in ("declared", "hidden")]
    for record in records:
        del record["plan_hash"], record["sum"]  # they cover the name of the family
    assert records[0] == records[1]
    weights = "model.safetensors"
    assert (tmp_path / "hidden" / weights).read_bytes() == (tmp_path / "declared" / weights).read_bytes()


def test_experts_that_are_stored_as_one_tensor(tmp_path):
    """gpt-oss: transposed, interleaved, with biases; each expert becomes two linears, and the biases stay."""
    model = gpt_oss(tmp_path / "model")
    qkit.quantize(model=model, out=tmp_path / "out", **GPTQ)
    record = json.loads((tmp_path / "out" / "qkit.json").read_text())
    names = [n for n in record["linears"] if ".experts." in n]
    assert len(names) == 2 * 4 * 2
    assert record["linears"]["model.layers.0.mlp.experts.3.gate_up_proj"]["shape"] == [128, 64]
    assert "model.layers.0.mlp.experts.gate_up_proj_bias" in record["plain"]
    assert "it routes tokens" in record["skipped"]["model.layers.0.mlp.router"]
    packed, plain = qkit.load(tmp_path / "out", dtype=torch.float32), qkit.load(model, dtype=torch.float32)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)  # qkit is imported
    tokens = torch.randint(5, 4000, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(stock(tokens).logits, packed(tokens).logits)
    again = qkit.plan(
        tmp_path / "out", scheme="w8a16", method="rtn"
    )  # of a source that is a result, with the same class
    assert again.prepared.plan.export == "qkit"
    experts = packed.model.layers[1].mlp.experts
    original = plain.model.layers[1].mlp.experts.gate_up_proj[2].T
    restored = torch.cat([m.weight for m in experts.experts[2]["first"]])
    assert (restored - original).norm() < 0.15 * original.norm()
    with torch.no_grad():  # the stock forward with the restored weights
        for i, layer in enumerate(plain.model.layers):
            own = packed.model.layers[i]
            for name, module in layer.named_modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.data = own.get_submodule(name).weight
            for e, expert in enumerate(own.mlp.experts.experts):
                layer.mlp.experts.gate_up_proj[e] = torch.cat([m.weight for m in expert["first"]]).T
                layer.mlp.experts.down_proj[e] = expert["down"].weight.T
        tokens = torch.randint(5, 4000, (2, 24), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(packed(tokens).logits, plain(tokens).logits, atol=1e-4, rtol=1e-5)


def test_transposed_linears(tmp_path):
    """GPT-2's Conv1D holds [in, out]; the result holds [out, in], as every linear does."""
    config = transformers.GPT2Config(vocab_size=4096, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    model = saved(config, tmp_path / "model")
    qkit.quantize(model=model, out=tmp_path / "out", **GPTQ)
    record = json.loads((tmp_path / "out" / "qkit.json").read_text())
    assert record["linears"]["transformer.h.0.attn.c_attn"]["shape"] == [192, 64]
    assert len(record["linears"]) == 8
    packed, plain = qkit.load(tmp_path / "out", dtype=torch.float32), qkit.load(model, dtype=torch.float32)
    restored, original = packed.transformer.h[1].mlp.c_fc.weight, plain.transformer.h[1].mlp.c_fc.weight.T
    assert (restored - original).norm() < 0.15 * original.norm()
    # A result as a source is no longer transposed, also where it is square.
    qkit.quantize(model=tmp_path / "out", out=tmp_path / "again", scheme="w8a16", method="rtn")
    again = qkit.load(tmp_path / "again", dtype=torch.float32)
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        first, second = (m.transformer.h[1].get_submodule(name).weight for m in (packed, again))
        assert (first - second).norm() < 0.02 * first.norm(), name


def test_which_linears_read_one_tensor_is_seen_in_a_run(tmp_path):
    """GPT-J's blocks are parallel: attention and MLP read one norm."""
    config = transformers.GPTJConfig(vocab_size=4096, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=64)
    structure = open_structure(str(saved(config, tmp_path / "model")))
    groups = [tuple(x.param for x in g.linears) for g in structure.blocks[0].groups]
    assert ("attn.k_proj.weight", "attn.v_proj.weight", "attn.q_proj.weight", "mlp.fc_in.weight") in groups


def test_tensors_that_the_class_does_not_load_are_copied(tmp_path):
    config = transformers.StableLmConfig(
        **SIZES, intermediate_size=96, num_key_value_heads=2, max_position_embeddings=64
    )
    model = saved(config, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["mtp.fc.weight"] = torch.arange(6.0).reshape(2, 3).bfloat16()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    qkit.quantize(model=model, out=tmp_path / "out", scheme="w4a16", method="rtn")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["mtp.fc.weight"], tensors["mtp.fc.weight"])
    assert "mtp.fc.weight" in json.loads((tmp_path / "out" / "qkit.json").read_text())["plain"]
    qkit.verify(tmp_path / "out")
    tensors["model.layers.7.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadCheckpoint, match=r"counts 2 blocks in model.layers, and the file has 'model.layers.7"):
        open_structure(str(model))


@pytest.mark.parametrize(
    "cls", [transformers.BertForSequenceClassification, transformers.BertModel, transformers.BertForMaskedLM]
)
def test_classes_beyond_language_models(cls, tmp_path):
    config = transformers.BertConfig(
        vocab_size=4096, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=64,
    )  # fmt: skip
    model = saved(config, tmp_path / "model", cls)
    qkit.quantize(model=model, out=tmp_path / "out", **GPTQ)
    packed, plain = qkit.load(tmp_path / "out", dtype=torch.float32), qkit.load(model, dtype=torch.float32)
    assert type(packed) is cls
    tokens = torch.randint(5, 4000, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = packed(tokens)[0].flatten(), plain(tokens)[0].flatten()
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.9


def test_a_matrix_whose_stored_name_is_bare_is_stored_once(tmp_path):
    """Under a name that does not end in '.weight', a matrix would be in the result as it was, beside its packed form."""
    model = sweep_configs.save("causal", "inkling2_text", tmp_path / "model")
    bare = {n for n in load_file(model / "model.safetensors") if n.endswith(".weight_proj")}
    qkit.quantize(model=model, out=tmp_path / "out", scheme="w4a16", method="rtn")
    written = load_file(tmp_path / "out" / "model.safetensors")
    packed = [n for n in written if n.endswith("weight_proj.weight_packed")]
    assert bare and not bare & written.keys() and len(packed) == len(bare)
    qkit.verify(tmp_path / "out")
    qkit.load(tmp_path / "out")


def test_a_config_of_another_size_is_refused(tmp_path):
    model = tiny_models.make("llama", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    for field, value, message in (
        ("num_hidden_layers", 1, "counts 1 blocks"),
        ("hidden_size", 128, "has shape"),
        ("vocab_size", 4097, "has shape"),
    ):
        (model / "config.json").write_text(json.dumps({**config, field: value}))
        with pytest.raises(BadCheckpoint, match=message):
            ModelStructure(Checkpoint.open(model))


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_scales_are_folded_into_what_is_seen_to_feed_the_linears(family, tmp_path, monkeypatch):
    """awq on a hidden family: the norms and linears are found, with what a norm adds to its weight; the function stays."""
    model = tiny_models.make(family, tmp_path / "model")
    declared = open_structure(str(model))
    monkeypatch.setattr(discover, "DECLARED", ())
    sources = [g.declared.source for g in open_structure(str(model)).blocks[0].groups]
    assert sources == [g.declared.source for g in declared.blocks[0].groups] and "norm" in (sources[0] or "")
    qkit.quantize(model=model, out=tmp_path / "awq", scheme="w8a16", method="awq", samples=4, seqlen=32)
    plain = load_file(model / "model.safetensors")
    scaled = load_file(tmp_path / "awq" / "model.safetensors")
    norms = [n for n in plain if "norm" in n and n.endswith("weight") and ".0." in n]
    assert any(not torch.equal(plain[n], scaled[n]) for n in norms)
    packed, original = (qkit.load(path, dtype=torch.float32) for path in (tmp_path / "awq", model))
    tokens = torch.randint(5, 4000, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = packed(tokens).logits, original(tokens).logits
    assert (a - b).norm() < 0.05 * b.norm()


def test_every_expert_can_be_measured_on_all_tokens(tmp_path, run):
    model = tiny_models.make("qwen3_moe", tmp_path / "model")
    counts = {}
    for flag in ([], ["--calibrate-all-experts"], ["--expert-share", "0.25"]):
        out = tmp_path / f"out{len(flag)}"
        code, text, _ = run(
            "quantize", "--model", model, "--scheme", "w4a16", "--method", "gptq", "--samples", 4, "--seqlen", 32, *flag,
            "--out", out,
        )  # fmt: skip
        assert code == 0
        linears = json.loads((out / "qkit.json").read_text())["linears"]
        counts[len(flag)] = {n: x["tokens"] for n, x in linears.items() if ".experts." in n}
        few = sum(t < 32 for t in counts[len(flag)].values())
        told = f"{few} of {len(counts[len(flag)])} linears saw fewer than 32" in " ".join(text.split())
        assert told == (few > 0)
    assert set(counts[1].values()) == {4 * 32}
    assert all(counts[0][n] < counts[2][n] <= counts[0][n] + 4 * 8 for n in counts[0])
    assert sum(counts[0].values()) == sum(counts[1].values()) / 2  # two of four experts for each token


def test_experts_in_one_tensor_that_a_rule_skips_are_copied_as_it(tmp_path):
    model, recipe = gpt_oss(tmp_path / "model"), tmp_path / "r.yaml"
    recipe.write_text('scheme: w4a16\nrules:\n  - match: "*.layers.0.mlp.experts.*"\n    skip: kept\n')
    qkit.quantize(model=model, out=tmp_path / "out", recipe=recipe)
    tensors, record = (
        load_file(tmp_path / "out" / "model.safetensors"),
        json.loads((tmp_path / "out" / "qkit.json").read_text()),
    )
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(tensors[name], load_file(model / "model.safetensors")[name])
    assert record["skipped"][name] == "kept" and "model.layers.1.mlp.experts.2.down_proj" in record["linears"]
    packed, plain = (qkit.load(path, dtype=torch.float32) for path in (tmp_path / "out", model))
    assert torch.equal(packed.model.layers[0].mlp.experts.gate_up_proj, plain.model.layers[0].mlp.experts.gate_up_proj)


def test_padding_of_a_model_that_is_called_row_by_row(tmp_path):
    """Zamba's blocks get the embeddings of the row, so that each row has calls of its own."""
    model, chats = sweep_configs.save("causal", "zamba", tmp_path / "model"), tmp_path / "chat.jsonl"
    texts = [
        "A short one.",
        "A text that is a good deal longer than the first one, and longer than the second.",
        "Three.",
    ]
    chats.write_text("".join(json.dumps({"text": t}) + "\n" for t in 4 * texts))
    qkit.quantize(model=model, out=tmp_path / "out", **{**GPTQ, "samples": 6}, calib=chats, padded=True)
    record = json.loads((tmp_path / "out" / "qkit.json").read_text())
    counted = record["calibration"]["sources"][0]["tokens"]
    assert {x["tokens"] for x in record["linears"].values()} == {counted} and counted < 6 * 32


def test_padding_is_refused_where_tokens_read_what_follows(tmp_path):
    config = transformers.BertConfig(
        vocab_size=4096, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96
    )
    model = saved(config, tmp_path / "model", transformers.BertModel)
    with pytest.raises(UsageError, match="--padded: a BertModel reads its samples in both directions"):
        qkit.quantize(model=model, out=tmp_path / "out", **GPTQ, padded=True)


def test_stacked_experts_see_the_tokens_that_are_sent_to_them(tmp_path):
    """Llama 4 multiplies by all experts in one batched product, where the tokens of others are zeros."""
    model = sweep_configs.save("causal", "llama4_text", tmp_path / "model")
    qkit.quantize(model=model, out=tmp_path / "out", **GPTQ)
    linears = json.loads((tmp_path / "out" / "qkit.json").read_text())["linears"]
    first = {n: x["tokens"] for n, x in linears.items() if n.startswith("model.layers.0.feed_forward.experts.")}
    gates = [t for n, t in first.items() if n.endswith("gate_up_proj")]
    assert min(gates) > 0 and len(set(gates)) > 1 and sum(gates) % (4 * 32) == 0
    for n, tokens in first.items():
        assert tokens == first[n.replace("down_proj", "gate_up_proj")]


def test_a_linear_inside_a_gate_beside_experts_routes(tmp_path):
    model = sweep_configs.save("causal", "hunyuan_v1_moe", tmp_path / "model")
    structure = open_structure(str(model))
    assert not any(".gate." in x.name for b in structure.blocks for x in b.linears)
    assert "routes tokens" in structure.tables["model.layers.0.mlp.gate.wg"]


def test_a_linear_that_routes_is_not_quantized(tmp_path):
    """Zaya's router is a network of plain linears."""
    model = sweep_configs.save("causal", "zaya", tmp_path / "model")
    structure = open_structure(str(model))
    names = {x.owner for b in structure.blocks for x in b.linears}
    assert not any("router" in n for n in names), names
    assert any("router" in n and "routes tokens" in why for n, why in structure.tables.items())


class _Norm(torch.nn.Module):
    """A norm whose gain is a function of its weight."""

    def __init__(self, gain):
        super().__init__()
        self.weight, self.gain = torch.nn.Parameter(torch.linspace(0.5, 1.5, 8)), gain

    def forward(self, x):
        return torch.nn.functional.rms_norm(x, (8,)) * self.gain(self.weight)


@pytest.mark.parametrize(
    ("gain", "offset"), [(lambda w: w, 0.0), (lambda w: 1 + w, 1.0), (lambda w: w**2, None), (lambda w: 2 + w, None)]
)
def test_what_a_norm_adds_to_its_weight(gain, offset):
    assert norm_offset(_Norm(gain)) == offset
