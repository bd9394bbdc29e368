"""Point 12: what is refused is refused at plan time, with the true reason, and what is trivially right works."""

import json
import shutil

import pytest
import qkit_data
import tiny_models
import torch
import transformers

import qkit
from qkit.errors import QkitError, Unsupported
from qkit.workflows.quantize import Request, prepare, quantize

SIZES = {**tiny_models._SIZES, "hidden_size": 32, "intermediate_size": 48}
MOE = dict(
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
)
DEEPSEEK = dict(
    num_key_value_heads=4,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    n_shared_experts=1,
)
VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)


def made(folder, name, kind, **fields):
    """A random model of a class of transformers, with a tokenizer."""
    config = transformers.AutoConfig.for_model(kind, **fields)
    torch.manual_seed(0)
    getattr(transformers, name)._from_config(config, dtype=torch.bfloat16).save_pretrained(folder / name)
    tiny_models.add_tokenizer(folder / name)
    return folder / name


def plan(folder, **fields):
    return prepare(Request(model=str(folder), **{"scheme": "w4a16", "group_size": 16, "threads": 1, **fields})).plan


@pytest.mark.parametrize(
    "name, kind, fields, word",
    [
        ("DeepseekV3ForCausalLM", "deepseek_v3", {**SIZES, **MOE, **DEEPSEEK}, "experts.1.gate_proj"),
        ("Glm4MoeForCausalLM", "glm4_moe", {**SIZES, **MOE, "head_dim": 8}, "experts.1.gate_proj"),
        (
            "Llama4ForCausalLM",
            "llama4_text",
            {**SIZES, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "moe_layers": [1]},
            "feed_forward.experts.1.gate_up_proj",
        ),
        ("LlamaModel", "llama", SIZES, "layers.1.mlp.up_proj"),
        ("Qwen3Model", "qwen3", {**SIZES, "head_dim": 8}, "layers.1.mlp.up_proj"),
        (
            "Qwen3ForSequenceClassification",
            "qwen3",
            {**SIZES, "head_dim": 8, "pad_token_id": 0},
            "layers.1.mlp.up_proj",
        ),
        (
            "Gemma3ForConditionalGeneration",
            "gemma3",
            {
                "text_config": {**SIZES, "head_dim": 8, "model_type": "gemma3_text"},
                "vision_config": {**VISION, "model_type": "siglip_vision_model"},
                "mm_tokens_per_image": 4,
            },
            "layers.1.mlp.up_proj",
        ),
        ("MambaForCausalLM", "mamba", {"vocab_size": 4096, "hidden_size": 32, "num_hidden_layers": 2}, "mixer.in_proj"),
        (
            "Mamba2ForCausalLM",  # its config.json has {"__float__": "Infinity"}
            "mamba2",
            dict(vocab_size=4096, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, n_groups=1, state_size=8),
            "mixer.in_proj",
        ),
    ],
)  # fmt: skip
def test_architectures(tmp_path, name, kind, fields, word):
    """Architectures that nobody declared, and classes without an output head, are planned. word: in the name of a layer"""
    found = plan(made(tmp_path, name, kind, **fields))
    assert any(word in layer for layer in found.linears) and not set(found.linears) & set(found.skipped)


@pytest.mark.parametrize(
    "name, kind, fields, method",
    [
        ("Gemma2ForCausalLM", "gemma2", {**SIZES, "head_dim": 8}, "gptq"),
        ("MptForCausalLM", "mpt", dict(vocab_size=4096, d_model=32, n_layers=2, n_heads=4), "gptq"),
        ("BloomForCausalLM", "bloom", dict(vocab_size=4096, hidden_size=32, n_layer=2, n_head=4), "gptq"),
    ],
)
def test_classes_without_sdpa_work(tmp_path, calib, quiet, name, kind, fields, method):
    """Attention that such a class has; the result is what stock transformers loads."""
    folder, out = made(tmp_path, name, kind, **fields), tmp_path / "out"
    rows = {} if method == "rtn" else {"calib": calib, "samples": 2, "seqlen": 16}
    assert quantize(
        Request(model=str(folder), scheme="w8a16", method=method, group_size=16, threads=1, **rows), out, quiet
    ).ok
    tokens = tiny_models.tokens(2, 12)
    stock = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    original = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = tiny_models.logits(qkit.load(out, dtype=torch.float32), tokens)
    assert tiny_models.relative(found, tiny_models.logits(stock, tokens)) < 1e-4
    assert tiny_models.relative(found, tiny_models.logits(original, tokens)) < 0.05


def test_a_checkpoint_that_is_incomplete_is_said_to_be(tiny, tmp_path):
    """The reason that others got falsely."""
    folder = shutil.copytree(tiny("llama"), tmp_path / "m")
    import safetensors.torch

    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(QkitError, match="the checkpoint is incomplete"):
        plan(folder)


def test_mistrals_own_files(tiny, tmp_path):
    """The same weights once more: no other shards, and no model by themselves."""
    folder = shutil.copytree(tiny("llama"), tmp_path / "m")
    for name in ("consolidated.safetensors", "consolidated-00001-of-00002.safetensors"):
        shutil.copy(folder / "model.safetensors", folder / name)
    index = {"weight_map": {}}
    import safetensors

    with safetensors.safe_open(folder / "model.safetensors", "pt") as f:
        index["weight_map"] = dict.fromkeys(f.keys(), "model-00001-of-00001.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert plan(folder).linears
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(Unsupported, match="Mistral's own"):
        plan(folder)


@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter(tiny, tmp_path, whole):
    """Alone, and beside a model that it would be lost from."""
    folder = shutil.copytree(tiny("llama"), tmp_path / "m")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")
    if not whole:
        for name in ("config.json", "model.safetensors"):
            (folder / name).unlink()
    with pytest.raises(Unsupported, match=r"an adapter \(LoRA\).*merge_and_unload"):
        plan(folder)


def test_files_given_as_models(run, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\0" * 50)
    code, _, err = run("plan", "--model", tmp_path / "m.gguf", "--scheme", "w4a16")
    assert code == 3 and "GGUF, the format of llama.cpp" in err
    file = qkit_data.model_path("tiny-llama") / "model.safetensors"
    code, _, err = run("plan", "--model", file, "--scheme", "w4a16")
    assert code == 3 and "use the folder of the file" in err
