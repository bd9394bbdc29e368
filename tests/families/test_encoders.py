"""Encoders, and decoders behind them, that nobody declared: what their structure needs beyond that of language models."""

import json
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file

import qkit
from qkit.errors import NumericFailure, Unsupported
from qkit.families.matrices import ROUTER_REASON, TABLE_REASON
from qkit.families.sharing import Reads
from qkit.families.text_arguments import text_arguments
from qkit.families.unsaved import unsaved_parameters
from qkit.planning.fused_layers import engine_lines_of
from qkit.planning.request import Request
from qkit.workflows.quantize import open_structure, prepare

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import sweep_configs

GPTQ = dict(scheme="w4a16", method="gptq", samples=4, seqlen=32, threads=1)
RTN = dict(scheme="w4a16", method="rtn", threads=1)
T5 = dict(vocab_size=4096, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)


def record_of(out):
    return json.loads((out / "qkit.json").read_text())


def saved(model, folder):
    """The model in bfloat16 with random values, and the embedded tokenizer."""
    torch.manual_seed(0)
    sweep_configs.randomize(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_models.add_tokenizer(folder)
    return folder


def test_a_decoder_behind_an_encoder_is_calibrated_and_tables_of_both_are_named(tmp_path):
    model = saved(transformers.MT5ForConditionalGeneration(transformers.MT5Config(**T5)), tmp_path / "model")
    structure = open_structure(str(model))
    assert structure.family.blocks == ("decoder.block",) and [t.name for t in structure.towers] == ["encoder"]
    assert structure.towers[0].on_text and structure.family.reads.whole
    qkit.quantize(model, out=tmp_path / "out", **GPTQ)
    record = record_of(tmp_path / "out")
    for part in ("encoder", "decoder"):
        assert record["skipped"][f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias"] == TABLE_REASON
    cross = record["linears"]["decoder.block.1.layer.1.EncDecAttention.k"]
    assert cross["solver"] == "gptq" and not cross["fallback"]
    qkit.load(tmp_path / "out")


def test_a_decoder_reads_the_row_one_token_later():
    t5 = transformers.T5Model(transformers.T5Config(**T5, decoder_start_token_id=7))
    found = text_arguments(t5, {"input_ids": torch.tensor([[3, 4, 5]])})
    assert found["decoder_input_ids"].tolist() == [[7, 3, 4]]
    given = {"input_ids": torch.tensor([[3]]), "decoder_input_ids": torch.tensor([[9]])}
    assert text_arguments(t5, given) == given
    bert = transformers.BertModel(transformers.BertConfig(num_hidden_layers=1, hidden_size=24))
    assert text_arguments(bert, {"input_ids": torch.tensor([[3]])}).keys() == {"input_ids"}


def test_tokens_may_have_another_name_or_no_vocabulary(tmp_path):
    perceiver = transformers.PerceiverModel(
        transformers.PerceiverConfig(
            d_model=16, d_latents=16, num_latents=4, num_self_attends_per_block=1, num_blocks=1
        )
    )
    assert text_arguments(perceiver, {"input_ids": torch.tensor([[3]])}).keys() == {"inputs"}
    config = transformers.CanineConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128, num_hash_buckets=64,
        local_transformer_stride=8, downsampling_rate=4, max_position_embeddings=128,
    )  # fmt: skip
    model = saved(transformers.CanineModel(config), tmp_path / "model")
    qkit.plan(model, **GPTQ)


def test_a_decoder_that_speaks_begins_by_itself():
    """Its tokens are those of sound, one for each channel; a decoder without such methods reads text."""

    class Model(torch.nn.Module):
        def __init__(self, table):
            super().__init__()
            self.config, self.table = transformers.T5Config(decoder_start_token_id=7), table

        def get_decoder(self):
            return self

        def get_input_embeddings(self):
            if self.table is None:
                raise NotImplementedError
            return self.table

        def forward(self, input_ids, decoder_input_ids=None): ...

    row = {"input_ids": torch.tensor([[3, 4]])}
    assert (
        text_arguments(Model(None), row).keys() == text_arguments(Model(torch.nn.Identity()), row).keys() == row.keys()
    )
    assert text_arguments(Model(torch.nn.Embedding(8, 2)), row)["decoder_input_ids"].tolist() == [[7, 3]]


def test_routers_in_an_encoder_are_named(tmp_path):
    config = transformers.SwitchTransformersConfig(
        **T5, num_decoder_layers=2, num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1
    )
    model = saved(transformers.SwitchTransformersForConditionalGeneration(config), tmp_path / "model")
    tables = open_structure(str(model)).tables
    assert tables["encoder.block.1.layer.1.mlp.router.classifier"] == ROUTER_REASON
    assert tables["decoder.block.1.layer.2.mlp.router.classifier"] == ROUTER_REASON


def test_tables_in_a_list_outside_the_blocks_are_named(tmp_path):
    """A list of embeddings, one for each level of a path in a page."""
    config = transformers.MarkupLMConfig(
        vocab_size=4096, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128, max_depth=3,
        xpath_unit_hidden_size=8,
    )  # fmt: skip
    model = saved(transformers.MarkupLMModel(config), tmp_path / "model")
    qkit.quantize(model, out=tmp_path / "out", **RTN)
    skipped = record_of(tmp_path / "out")["skipped"]
    names = [n for n in skipped if "xpath_tag_sub_embeddings" in n]
    assert len(names) == 3 and {skipped[n] for n in names} == {TABLE_REASON}


def test_positions_that_are_computed_and_not_saved(tmp_path):
    config = transformers.MarianConfig(
        vocab_size=4096, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=48, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    )  # fmt: skip
    source = saved(transformers.MarianMTModel(config), tmp_path / "model")
    assert "model.encoder.embed_positions.weight" not in load_file(source / "model.safetensors")
    qkit.quantize(source, out=tmp_path / "out", **RTN)
    loaded = qkit.load(tmp_path / "out", torch.float32)
    wanted = transformers.MarianMTModel.from_pretrained(source, dtype=torch.float32)
    for part in ("encoder", "decoder"):
        positions = [getattr(m.model, part).embed_positions.weight for m in (loaded, wanted)]
        assert torch.allclose(*positions, atol=4e-3) and positions[0].std() > 0.5  # computed in bfloat16 as the file is


def test_what_an_initializer_draws_at_random_is_not_computed():
    class Drawn(torch.nn.Module):
        _keys_to_ignore_on_save = ("a.weight", "b.weight")

        def __init__(self):
            super().__init__()
            with torch.device("meta"):
                self.a, self.b = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)

        def _init_weights(self, module):
            with torch.no_grad():
                module.weight.normal_() if module is self.a else module.weight.fill_(3)

    model = Drawn()
    found = unsaved_parameters(model, ())
    assert found.keys() == {"b.weight"} and found["b.weight"].eq(3).all() and model.b.weight.is_meta
    assert not unsaved_parameters(model, ("b.weight",))


def test_linears_that_run_twice_on_the_same_inputs_are_one_group(tmp_path):
    """PEGASUS-X projects its tokens and its global tokens by the same q, k and v, which engines load as one."""
    config = transformers.PegasusXConfig(
        vocab_size=4096, d_model=64, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=128, decoder_ffn_dim=128, block_size=8, num_global_tokens=4, max_position_embeddings=64,
    )  # fmt: skip
    model = saved(transformers.PegasusXForConditionalGeneration(config), tmp_path / "model")
    (tower,) = open_structure(str(model)).towers
    groups = [{x.name.rpartition(".")[2] for x in g.linears} for g in tower.blocks[0].groups]
    assert {"q_proj", "k_proj", "v_proj"} in groups
    qkit.quantize(model, out=tmp_path / "out", **RTN)


def test_keys_that_are_made_of_more_than_queries_are_one_group_with_them():
    x, y = torch.zeros(1), torch.ones(1)
    reads = Reads(inputs={"b.q_proj": [x], "b.k_proj": [x, y], "b.v_proj": [x, y], "b.o_proj": [y]}, whole=True)
    reads.calls.update({"b": 1, "b.q_proj": 1, "b.k_proj": 2, "b.v_proj": 2, "b.o_proj": 1})
    groups = [g.linears for g in reads.groups("b", ["q_proj", "k_proj", "v_proj", "o_proj"])]
    assert groups == [("o_proj",), ("k_proj", "v_proj", "q_proj")]  # the first one's inputs are measured
    reads.inputs["b.k_proj"] = reads.inputs["b.v_proj"] = [y, y]  # keys of another text
    groups = [g.linears for g in reads.groups("b", ["q_proj", "k_proj", "v_proj", "o_proj"])]
    assert groups == [("q_proj",), ("o_proj",), ("k_proj", "v_proj")]


def test_statistics_beside_a_computed_buffer_have_the_dtype_that_is_asked_for(tmp_path):
    """A block with a table of positions of its own has a batch norm inside."""
    source = sweep_configs.save("encoders", "granite_speech5_ctc:ctc", tmp_path / "model")
    qkit.quantize(source, out=tmp_path / "out", **RTN)
    loaded = qkit.load(tmp_path / "out", torch.float32)
    means = [b for n, b in loaded.named_buffers() if n.endswith("running_mean")]
    assert means and {b.dtype for b in means} == {torch.float32}


def test_lists_of_lists_are_no_blocks(tmp_path):
    config = transformers.FunnelConfig(
        vocab_size=4096, block_sizes=[1, 2], d_model=64, n_head=4, d_head=16, d_inner=128, num_decoder_layers=1
    )
    model = saved(transformers.FunnelForSequenceClassification(config), tmp_path / "model")
    structure = open_structure(str(model))
    assert [b.path for b in structure.blocks] == [f"funnel.encoder.blocks.{i}" for i in ("0.0", "1.0", "1.1")]


def test_two_models_in_one_are_tied_as_their_decoder_says(tmp_path):
    sizes = dict(vocab_size=4096, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128)
    encoder = transformers.BertConfig(**sizes)
    decoder = transformers.BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.tie_word_embeddings = False
    model = saved(transformers.EncoderDecoderModel(config), tmp_path / "model")
    qkit.quantize(model, out=tmp_path / "out", **RTN)
    assert record_of(tmp_path / "out")["tied"]
    assert qkit.verify(tmp_path / "out").ok


def test_a_count_of_positions_that_is_written_as_a_decimal(tmp_path):
    config = transformers.BertConfig(
        vocab_size=4096, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128
    )
    model = saved(transformers.BertModel(config), tmp_path / "model")
    stated = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(stated | {"vision_config": {"max_position_embeddings": 1200.0}}))
    qkit.plan(model, **RTN)


@pytest.mark.parametrize("kind", ["modernbert:masked", "t5:seq2seq", "umt5:seq2seq", "switch_transformers:seq2seq"])
def test_stock_transformers_is_not_claimed_where_it_reads_weights_by_itself(kind, tmp_path):
    prepared = prepare(Request(model=str(sweep_configs.save("encoders", kind, tmp_path / "m")), **RTN))
    lines = engine_lines_of(prepared.plan, prepared.structure)
    assert [line.loads for line in lines if line.engine.startswith("transformers")] == [False]


def test_bounds_that_are_open_are_infinite_and_come_through(tmp_path):
    config = transformers.Gemma4AudioConfig(
        hidden_size=128, num_hidden_layers=1, num_attention_heads=2, output_proj_dims=128
    )
    model = transformers.Gemma4AudioModel(config).bfloat16().eval()
    model.save_pretrained(tmp_path / "source")
    assert float(model.layers[0].feed_forward1.ffw_layer_1.input_max) == float("inf")
    qkit.quantize(tmp_path / "source", out=tmp_path / "out", scheme="w8a16", method="rtn")
    packed = qkit.load(tmp_path / "out", torch.float32)
    assert float(packed.layers[0].feed_forward1.ffw_layer_1.input_max) == float("inf")
    with pytest.raises(Unsupported, match="a vocabulary of tokens, and this model reads input_features: use a method"):
        qkit.quantize(tmp_path / "source", out=tmp_path / "gptq", scheme="w8a16", method="gptq")
    shard = tmp_path / "source" / "model.safetensors"
    tensors = load_file(shard)
    tensors["layers.0.feed_forward1.ffw_layer_1.input_max"] = torch.tensor(float("nan"), dtype=torch.bfloat16)
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(NumericFailure, match="input_max': 1 of 1 values"):
        qkit.quantize(tmp_path / "source", out=tmp_path / "bad", scheme="w8a16", method="rtn")


def test_a_model_that_reads_states_of_another_is_refused_for_calibration_with_their_name(tmp_path):
    source = sweep_configs.save("causal", "gemma4_assistant", tmp_path / "source")
    with pytest.raises(
        Unsupported, match=r"on a text alone .beside tokens it takes shared_kv_states, which rows .*rtn"
    ):
        qkit.quantize(source, out=tmp_path / "out", **GPTQ)
