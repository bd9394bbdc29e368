"""--export mlx: what MLX's layout has no place for is refused when the plan is made."""

import json
import re

import pytest
import tiny_models
import torch

G32 = ("--scheme", "w4a16", "--group-size", "32")
REFUSED = [
    (
        "llama",
        ("--scheme", "w4a16", "--group-size", "16"),
        r"q_proj: it has groups of 16, and MLX has groups of 32, 64, 128",
    ),
    (
        "llama",
        ("--scheme", "w8a8"),
        r"q_proj: its inputs are quantized \(int8_token\), and files of MLX quantize weights only",
    ),
    ("llama", ("--scheme", "nvfp4a16"), r"q_proj: MLX stores NVFP4 without a global scale"),
    ("llama", (*G32, "--outliers", "1"), r"that format has no place for the sparse part"),
    ("llama", (*G32, "--kv", "fp8", "--seqlen", "64"), r"MLX has no place for the scales of an FP8 KV cache"),
    ("llama", (*G32, "--embeddings", "int8"), r"embed_tokens: it has one scale per channel"),
    (
        "qwen3_moe",
        G32,
        r"experts\.0\.\w+: mlx_lm does not load it: it stacks packed experts of .*, and not those of qwen3_moe",
    ),
]


@pytest.mark.parametrize(("family", "options", "why"), REFUSED)
def test_refused_with_the_reason(family, options, why, run, tiny):
    code, _, err = run("plan", "--model", tiny(family), *options, "--export", "mlx")
    assert code == 3 and err.startswith("qkit: --export mlx: ") and err.count("\n") == 1
    assert re.search(why, err), err


def test_zero_points_of_a_float32_model(run, tmp_path):
    model = tiny_models.make("llama", tmp_path / "model", torch.float32)
    plan = ("plan", "--model", model, "--group-size", "32", "--export", "mlx", "--scheme")
    code, _, err = run(*plan, "w4a16_asym")
    assert code == 3 and "float32, which the scales of this model have, does not hold it" in err
    assert run(*plan, "w4a16")[0] == 0


@pytest.mark.parametrize("family", ["mixtral", "llama"])
def test_planned_bytes_are_those_of_the_result(family, run, tiny, tmp_path):
    options = (
        "--scheme",
        "w4a16_asym",
        "--group-size",
        "32",
        "--embeddings",
        "int6:64",
        "--export",
        "mlx",
        "--engine",
        "any",
    )
    out, file = tmp_path / "out", tmp_path / "plan.json"
    code, said, err = run("quantize", "--model", tiny(family), *options, "--out", out, "--json", file)
    assert code == 0, err
    header = int.from_bytes((out / "model.safetensors").read_bytes()[:8], "little") + 8
    planned = json.loads(file.read_text())["forecast"]["packed_bytes"]
    assert (out / "model.safetensors").stat().st_size - header == planned
    assert "loads in mlx-lm: " in said and "warning: no engine" not in said + err
    code, _, err = run("serve-command", out)
    assert code == 3 and "vLLM does not load it" in err and "use mlx_lm.server, qkit.load" in err
