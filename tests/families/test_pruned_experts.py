"""Models without some of their routed experts (--prune-experts): which stay, what the result is, and what is refused."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import qkit
from qkit.calibration.expert_scores import chosen
from qkit.commands.quantize import quantize_command
from qkit.engine import expert_pruning
from qkit.errors import Unsupported, UsageError
from qkit.families.pruned import without_experts
from qkit.planning.request import Request
from qkit.workflows.calibration_rows import calibration_of
from qkit.workflows.quantize import open_structure

sys.path.insert(0, str(Path(__file__).parent))

from test_discovered import gpt_oss, saved

ROWS = dict(samples=4, seqlen=32)


def model_of(family, folder):
    return gpt_oss(folder) if family == "gpt_oss" else tiny_models.make(family, folder)


def pruned_by_hand(model, kept, folder):
    """The model without experts, made with transformers alone. kept: {block: experts}"""
    original = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    config = transformers.AutoConfig.from_pretrained(model)
    config.num_local_experts = len(next(iter(kept.values())))
    smaller = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    values = original.state_dict()
    for name, value in smaller.state_dict().items():
        if value.shape != values[name].shape:
            block = int(name.split("layers.")[1].split(".")[0])
            values[name] = values[name][kept[block]]
    smaller.load_state_dict(values)
    smaller.save_pretrained(folder)
    tiny_models.add_tokenizer(folder)
    return folder


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_result_is_that_of_a_model_that_was_cut_by_hand(family, tmp_path):
    model = model_of(family, tmp_path / "model")
    options = dict(scheme="w4a16", method="rtn")
    assert qkit.quantize(model=model, out=tmp_path / "out", prune_experts=0.25, **options, **ROWS).ok
    record = json.loads((tmp_path / "out" / "qkit.json").read_text())["experts"]
    kept = {i: block["kept"] for i, block in enumerate(record["blocks"].values())}
    assert all(len(k) == 3 for k in kept.values())
    by_hand = pruned_by_hand(model, kept, tmp_path / "smaller")
    qkit.quantize(model=by_hand, out=tmp_path / "expected", **options)
    found, expected = (load_file(tmp_path / x / "model.safetensors") for x in ("out", "expected"))
    assert found.keys() == expected.keys()
    assert all(found[n].equal(expected[n]) for n in expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_local_experts"] == 3
    ids = torch.arange(16)[None]
    logits = qkit.load(tmp_path / "out", dtype=torch.float32)(input_ids=ids).logits
    assert torch.allclose(logits, qkit.load(tmp_path / "expected", dtype=torch.float32)(input_ids=ids).logits)


def test_the_experts_that_contribute_least_are_left_out(tmp_path):
    model = tiny_models.make("qwen3_moe", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    for block, weak in enumerate((2, 0)):
        name = f"model.layers.{block}.mlp.experts.{weak}.down_proj.weight"
        tensors[name] = tensors[name] / 64
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    qkit.quantize(model=model, out=tmp_path / "out", scheme="w4a16", method="gptq", prune_experts=0.25, **ROWS)
    record = json.loads((tmp_path / "out" / "qkit.json").read_text())["experts"]
    assert [block["kept"] for block in record["blocks"].values()] == [[0, 1, 3], [1, 2, 3]]
    assert all(sum(block["tokens"]) == 4 * 32 * 2 for block in record["blocks"].values())


def test_scores_are_the_mean_of_weight_times_norm_over_the_tokens_of_an_expert(tmp_path):
    model = tiny_models.make("mixtral", tmp_path / "model", num_hidden_layers=1)
    qkit.quantize(model=model, out=tmp_path / "out", scheme="w4a16", prune_experts=0.25, keep_job=True, **ROWS)
    block = next(iter(json.loads((tmp_path / "out" / "qkit.json").read_text())["experts"]["blocks"].values()))
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    seen = []
    experts = reference.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda m, args: seen.append(args))
    tokens = calibration_of(Request(model=str(model), **ROWS), open_structure(str(model))).tokens
    with torch.no_grad():
        reference(input_ids=tokens)
        hidden, index, weights = seen[0]
        for e, score in enumerate(block["scores"]):
            token, slot = torch.where(index == e)
            gate, up = (hidden[token] @ experts.gate_up_proj[e].T).chunk(2, -1)
            out = (torch.nn.functional.silu(gate) * up) @ experts.down_proj[e].T
            expected = (weights[token, slot] * out.norm(dim=-1)).mean()
            assert block["tokens"][e] == len(token)
            assert score == pytest.approx(float(expected), rel=0.03)  # the run is in bfloat16


def test_of_equal_scores_the_first_experts_stay():
    assert chosen(torch.tensor([0.0, 2.0, 0.0, 1.0, 0.0], dtype=torch.float64), 3) == (0, 1, 3)


def test_a_stopped_run_goes_on_with_the_same_experts(tmp_path, monkeypatch):
    model = tiny_models.make("qwen3_moe", tmp_path / "model")
    options = dict(scheme="w4a16", method="gptq", prune_experts=0.25, **ROWS)
    qkit.quantize(model=model, out=tmp_path / "whole", **options)

    class Stop:
        def start(self, what, total):
            if what.startswith("block 2"):
                raise KeyboardInterrupt

        def step(self, amount=1):
            pass

    with pytest.raises(KeyboardInterrupt):
        qkit.quantize(model=model, out=tmp_path / "out", progress=Stop(), **options)
    monkeypatch.setattr(expert_pruning, "_measure", lambda *_: pytest.fail("measured again"))
    qkit.quantize(model=model, out=tmp_path / "out", **options)
    for name in ("model.safetensors", "qkit.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("share", "says"),
    [(0.05, "none of 4 experts"), (0.75, "1 experts are left, and each token gets 2")],
)
def test_shares_that_leave_too_many_or_too_few_are_refused(share, says, tmp_path):
    model = tiny_models.make("qwen3_moe", tmp_path / "model")
    with pytest.raises(Unsupported, match=says):
        without_experts(open_structure(str(model)), share)


def test_a_model_without_experts_is_refused(tmp_path):
    model = tiny_models.make("llama", tmp_path / "model")
    with pytest.raises(Unsupported, match="has no routed experts"):
        qkit.plan(model=model, scheme="w4a16", prune_experts=0.25)


def deepseek(folder, weak=(), **groups):
    """A DeepSeek-V3 of one block with 8 experts, in which the outputs of some are small."""
    config = transformers.DeepseekV3Config(
        vocab_size=4096, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=2, kv_lora_rank=16,
        q_lora_rank=16, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16, first_k_dense_replace=0, **groups,
    )  # fmt: skip
    saved(config, folder)
    tensors = load_file(folder / "model.safetensors")
    for e in weak:
        tensors[f"model.layers.0.mlp.experts.{e}.down_proj.weight"].div_(64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_groups_of_experts_that_a_router_chooses_from_have_to_stay_whole(tmp_path):
    model = deepseek(tmp_path / "four", n_group=4, topk_group=2)
    with pytest.raises(Unsupported, match="does not run with 6 of 8 experts"):
        qkit.plan(model=model, scheme="w4a16", prune_experts=0.25)
    model = deepseek(tmp_path / "uneven", weak=(0, 1), n_group=2, topk_group=1)
    with pytest.raises(Unsupported, match="of the choices of tokens that it could keep"):
        qkit.quantize(model=model, out=tmp_path / "out", scheme="w4a16", prune_experts=0.25, **ROWS)
    model = deepseek(tmp_path / "free", weak=(0, 1), n_group=2, topk_group=2)
    assert qkit.quantize(model=model, out=tmp_path / "out", scheme="w4a16", prune_experts=0.25, **ROWS).ok
    bias = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.gate.e_score_correction_bias"]
    assert bias.shape == (6,)


def test_a_budget_excludes_it(tmp_path):
    with pytest.raises(UsageError, match="and a budget"):
        qkit.quantize(model="tiny-llama", out=tmp_path / "out", bits=4, scheme="w4a16", prune_experts=0.25)
    with pytest.raises(UsageError, match="expected a share"):
        qkit.quantize(model="tiny-llama", out=tmp_path / "out", scheme="w4a16", prune_experts=1.5)


# ---- verify ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned")
    model = tiny_models.make("qwen3_moe", folder / "model")
    qkit.quantize(model=model, out=folder / "out", scheme="w4a16", method="gptq", prune_experts=0.25, **ROWS)
    return folder


def problems(pruned, tmp_path, change):
    out = tmp_path / "out"
    shutil.copytree(pruned / "out", out)
    record = json.loads((out / "qkit.json").read_text())
    change(record["experts"])
    (out / "qkit.json").write_text(json.dumps(record))
    return [str(p) for p in qkit.verify(out, source=pruned / "model").problems]


def test_verify_compares_every_expert_with_the_source(pruned):
    report = qkit.verify(pruned / "out", source=pruned / "model")
    assert report.ok and not report.notes
    assert report.checks["experts"] >= 2 * (3 * 3 + 1)
    assert qkit.verify(pruned / "out").checks["experts"] < report.checks["experts"]


def test_a_source_is_compared_with_pruned_experts_alone(run, tmp_path):
    qkit.quantize(tiny_models.make("llama", tmp_path / "m"), out=tmp_path / "out", scheme="w8a16", method="rtn")
    code, _, err = run("verify", tmp_path / "out", "--source", tmp_path / "m")
    assert code == 2 and "it is for results of --prune-experts" in err


def test_verify_finds_experts_that_are_not_those_of_the_record(pruned, tmp_path):
    def another(experts):
        block = next(iter(experts["blocks"].values()))
        lost = next(e for e in range(4) if e not in block["kept"])
        block["kept"] = sorted([lost, *block["kept"][1:]])

    found = problems(pruned, tmp_path, another)
    assert any("is nearest to expert" in p for p in found)
    assert any("its entries are not those of experts" in p for p in found)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x.update(left=2), "expected 2 numbers below 4"),
        (lambda x: x.update(fields=[["num_experts_per_tok"]]), "found 2, expected 3 experts"),
        (lambda x: next(iter(x["blocks"].values()))["kept"].reverse(), "expected them in order"),
        (lambda x: [b.update(scores=[9.0, 1.0, 1.0, 1.0], kept=[1, 2, 3]) for b in x["blocks"].values()], "its score is above"),
    ],
)  # fmt: skip
def test_verify_finds_a_record_that_does_not_agree_with_itself(change, says, pruned, tmp_path):
    assert any(says in p for p in problems(pruned, tmp_path, change))


def test_the_command_lists_what_was_left_out(tmp_path):
    model = tiny_models.make("qwen3_moe", tmp_path / "model", num_hidden_layers=1)
    arguments = ["--model", str(model), "--scheme", "w4a16", "--samples", "4", "--seqlen", "32"]
    result = CliRunner().invoke(
        quantize_command, [*arguments, "--prune-experts", "0.25", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    assert "experts: 3 of 4 stay in each of 1 blocks" in result.output
    assert "model.layers.0.mlp.experts: left out" in " ".join(result.output.split())
