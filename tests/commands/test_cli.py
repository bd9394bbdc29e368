"""The command line: what it says when something is wrong, the codes it exits with, and that its flags stay what they are."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import click
import pytest
import tiny_models
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qkit.commands import VERBS, cli, main

BUDGET = "bits candidates ceiling floor latency measure memory profile refine size"
FLAGS = {
    "quantize": "answers-only base calib calibrate-all-experts call device effort embeddings engine expert-share export gpu "
    "group-size head json keep-job keep-source kv kv-memory kv-scale-keys max-length method model option out outliers "
    "overwrite padded policy prune-experts quality rank recipe require-revision revision rows-memory samples "
    f"scheme seed seqlen significant strict synthetic-samples target threads tp unloaded work {BUDGET}",
    "plan": "answers-only base calib calibrate-all-experts call device effort embeddings engine expert-share explain export "
    "figures gpu group-size head json keep-source kv kv-memory kv-scale-keys max-length method model option out "
    "outliers padded policy prune-experts python quality rank recipe require-revision revision rows-memory samples scheme "
    "seed seqlen significant strict synthetic-samples target threads tp unloaded "
    f"{BUDGET}",
    "profile": "answers-only audit audit-text calib candidates embeddings group-size head json measures method model out "
    "padded pareto "
    "pareto-measure points rows samples seed seqlen threads",
    "verify": "engine engine-timeout gpu job json python source tp",
    "eval": "allow-task-code baseline card device dtype engine engine-timeout json kv kv-step image-text limit prompt python "
    "questions report retrieval suite task-dir tasks text vbench-python videos videos-dir window windows",
    "report": "eval json out profile",
    "check": "allow-task-code baseline budget device dtype json junit task-dir text",
    "bench": "baseline device dtype figure formats group-size json m model new-tokens prompt-tokens shapes table threads",
    "convert": "export json out overwrite",
    "recommend": "context device engine json memory model profile tp",
    "serve-command": "context forget json kv-dtypes limit measure python text tp windows",
    "push": "dry-run json message private revision",
    "inspect": "json",
    "doctor": "baseline engine json",
    "list": "json",
    "demo": "json overwrite work",
}
FORMER = {"quantize": "written", "plan": "written", "eval": "pairs"}  # names that go on working for one version


@pytest.fixture
def refused(run, tmp_path):
    """``refused(code, part, *arguments)``: the command exits with that code and one sentence that holds all parts."""

    def go(code: int, parts: str | tuple[str, ...], *arguments) -> str:
        found, _, err = run(*arguments)
        assert found == code, err
        lines = err.strip().splitlines()
        if code != 2 or err.startswith("qkit: "):
            assert len(lines) == 1 and lines[0].startswith("qkit: ")
        for part in (parts,) if isinstance(parts, str) else parts:
            assert part in err
        assert not (tmp_path / "out").exists()
        return err

    return go


def changed(source: Path, to: Path, config: dict | None = None, tensors=None) -> Path:
    """A copy of a model with config fields and tensors changed; a tensor given as None is left out."""
    shutil.copytree(source, to)
    if config:
        found = json.loads((to / "config.json").read_text())
        (to / "config.json").write_text(json.dumps({**found, **config}))
    if tensors:
        found = {**load_file(to / "model.safetensors"), **tensors}
        save_file({k: v.contiguous() for k, v in found.items() if v is not None}, to / "model.safetensors")
    return to


def tensor(folder: Path, name: str) -> torch.Tensor:
    with safe_open(folder / "model.safetensors", "pt") as f:
        return f.get_tensor(name)


def quantized(run, out: Path, *arguments) -> tuple[dict, dict, str]:
    """(qkit.json, config.json, stdout) of a quantize that must succeed."""
    code, said, err = run("quantize", *arguments, "--out", out)
    assert code == 0, err
    return json.loads((out / "qkit.json").read_text()), json.loads((out / "config.json").read_text()), said


# ---- the surface -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_flags_are_frozen(verb):
    command = cli.get_command(click.Context(cli), verb)
    options = [p for p in command.params if isinstance(p, click.Option)]
    flags = {o.removeprefix("--") for p in options if not p.hidden for o in p.opts}
    assert flags == set(FLAGS[verb].split())
    former = {o.removeprefix("--") for p in options if p.hidden for o in p.opts}
    assert former == set(FORMER.get(verb, "").split())


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(verb, run):
    code, out, _ = run(verb, "--help")
    assert code == 0 and f"qkit {verb}" in out.partition("Example")[2]


def test_help_and_version(run):
    code, out, _ = run("--help")
    assert code == 0 and all(verb in out for verb in VERBS)
    assert run("--version")[0] == 0


@pytest.mark.parametrize("what", ["schemes", "methods", "formats", "caches", "families", "models"])
def test_list(what, run, tmp_path):
    code, out, _ = run("list", what, "--json", tmp_path / "list.json")
    rows = json.loads((tmp_path / "list.json").read_text())
    assert code == 0 and rows and str(next(iter(rows[0].values()))) in out


# ---- usage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--scheme", "w4a61"], ("unknown scheme 'w4a61'", "did you mean W4A16?")),
        (["--scheme", "w4a16", "--method", "gptk"], ("unknown method 'gptk'", "did you mean gptq?")),
        (["--scheme", "w4a16", "--method", "rtn+gptq"], "at most one solver"),
        (["--scheme", "w4a16", "--method", "x/y.py:Class"], "unknown method"),
        (["--scheme", "w4a16", "--option", "dampp=0.1"], "unknown option 'dampp'"),
        (["--scheme", "w4a16", "--method", "gptq", "--option", "dampp=0.1"], ("unknown option", "did you mean damp?")),
        (["--scheme", "w4a16", "--method", "gptq", "--option", "damp=much"], ("option 'damp'", "expected float")),
        (["--scheme", "w4a16", "--option", "damp"], "expected NAME=VALUE"),
        (["--scheme", "w4a16", "--method", "gptq", "--option", "damp=0.1", "--option", "damp=1"], "is given twice"),
        (["--scheme", "w4a16", "--calibrate-all-experts", "--expert-share", "0.5"], "exclude each other: use one"),
        (["--scheme", "w4a16", "--group-size", "0"], "group size 0"),
        (["--scheme", "nvfp4", "--group-size", "64"], "fixed scale layout"),
        (["--scheme", "w4a16", "--threads", "0"], "--threads 0"),
        (["--scheme", "w4a16", "--method", "gptq", "--samples", "0"], "--samples 0"),
        (["--scheme", "w4a16", "--method", "gptq", "--seqlen", "512"], "positions for 128 tokens"),
        ([], "no scheme"),
        (["--shceme", "w4a16"], ("No such option", "--scheme")),
    ],
    ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else None,
)
def test_wrong_usage(options, said, refused, tiny, tmp_path):
    refused(2, said, "quantize", "--model", tiny("llama"), *options, "--out", tmp_path / "out")
    refused(2, said, "plan", "--model", tiny("llama"), *options)


def test_the_import_is_light_and_transformers_learns_of_qkit():
    """Whichever of the two is imported first."""
    known = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; assert 'qkit' in m"
    light = "import qkit, sys; assert not {'torch', 'transformers'} & {*sys.modules}"
    for code in (f"{light}; {known}", f"import transformers.quantizers, qkit; {known}"):
        subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_verb(refused):
    refused(2, "No such command", "quantise")


def test_no_such_model(refused, tmp_path):
    refused(3, ("no such model folder", "tiny-llama"), "plan", "--model", tmp_path / "none", "--scheme", "w4a16")


def test_debug_shows_the_traceback(tiny):
    from qkit.errors import UsageError

    with pytest.raises(UsageError):
        main(["--debug", "plan", "--model", str(tiny("llama")), "--scheme", "none"])


# ---- recipes ---------------------------------------------------------------------------------------------------

HEAD = "scheme: w4a16\nmethod: rtn\ngroup_size: 32\n"


@pytest.mark.parametrize(
    ("code", "text", "said"),
    [
        (3, HEAD + "methd: gptq\n", ("line 4", "methd", "method")),
        (3, HEAD + "method: gptq\n", ("line 4", "method")),
        (3, HEAD + "rules:\n  - match: '*'\n    shceme: w8a16\n", ("line 6", "shceme", "scheme")),
        (
            3,
            HEAD + "rules:\n  - match: '*.q_prj'\n    scheme: w8a16\n",
            ("'*.q_prj'", "matches no layer", "did you mean"),
        ),
        (
            3,
            HEAD + "rules:\n  - match: '*.q_proj'\n    scheme: w8a16\n",
            ("q_proj W8A16", "k_proj W4A16", "one scheme"),
        ),
        (3, HEAD + "rules:\n  - match: '*.k_proj'\n    skip: why not\n", ("k_proj skipped", "one scheme")),
        (3, HEAD + "rules:\n  - match: lm_head\n    skip: twice\n", "a default already decides"),
        (3, "scheme: .nan\n", "scheme"),
        (3, "scheme: [w4a16]\n", "scheme"),
        (3, "- scheme\n", "expected a mapping"),
        (3, "a: &a [x]\nb: [*a, *a]\n", "recipe.yaml"),
        (3, "scheme: !!python/object/apply:os.system ['touch x']\n", "recipe.yaml"),
        (
            2,
            HEAD + "rules:\n  - match: '*'\n    solver: path/to/file.py:Class\n",
            "unknown solver 'path/to/file.py:Class'",
        ),
        (2, HEAD + "rules:\n  - match: '*'\n    scheme: w4a61\n", ("recipe.yaml", "did you mean W4A16?")),
    ],
    ids=lambda v: v.removeprefix(HEAD) if isinstance(v, str) else None,
)
def test_bad_recipes(code, text, said, refused, tiny, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    refused(code, said, "plan", "--model", tiny("llama"), "--recipe", recipe)


def test_recipe_mixes_formats(run, tiny, tmp_path, small):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        HEAD.replace("rtn", "gptq")
        + "rules:\n  - match: 'model.layers.0.*'\n    skip: the first block\n"
        + "  - match: '*.down_proj'\n    scheme: fp8_dynamic\n    solver: rtn\n"
    )
    record, config, said = quantized(run, tmp_path / "out", "--model", tiny("llama"), "--recipe", recipe, *small)
    assert config["quantization_config"]["format"] == "mixed-precision"
    assert record["linears"]["model.layers.1.mlp.down_proj"]["solver"] == "rtn"
    assert record["skipped"]["model.layers.0.mlp.down_proj"] == "the first block" and "the first block" in said
    assert len(record["linears"]) == 7


# ---- calibration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", ("0 tokens are 0 samples of 32 tokens, 8 are needed")),
        (b"Too short a text.", ("samples of 32 tokens, 8 are needed", "(256 tokens)")),
        (b" the" * 4000, "samples are the same"),
        (b"good \xff\xfe bad" * 500, "byte 5 is not UTF-8"),
        (None, "no such calibration text"),
    ],
    ids=["empty", "short", "identical rows", "not UTF-8", "no file"],
)
def test_bad_calibration_text(content, said, refused, tiny, tmp_path):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    options = ["--scheme", "w4a16", "--method", "gptq", "--calib", text, "--samples", 8, "--seqlen", 32]
    refused(3, (*((said,) if isinstance(said, str) else said), str(text)), "plan", "--model", tiny("llama"), *options)


def test_tokenizer_of_another_model(refused, small, tmp_path):
    model = tiny_models.make("llama", tmp_path / "model", vocab_size=300)
    options = ["--scheme", "w4a16", "--method", "gptq", *small]
    refused(3, "the tokenizer does not belong to this model", "plan", "--model", model, *options)


def test_inputs_that_are_all_zero_everywhere_end_the_run(run, tiny, tmp_path, small):
    """Inputs that are all zero leave nothing to solve with: the run fails, says which layers, and keeps its parts."""
    source = tiny("llama")
    silent = torch.zeros_like(tensor(source, "model.embed_tokens.weight"))
    model = changed(source, tmp_path / "model", tensors={"model.embed_tokens.weight": silent})
    options = ["--scheme", "w4a16", "--method", "gptq", "--group-size", 32, *small, "--out", tmp_path / "out"]
    code, _, err = run("quantize", "--model", model, *options)
    assert code == 4 and len(err.strip().splitlines()) == 1
    assert "14 of 14 linears saw nothing but zeros" in err and "model.layers.0.self_attn.q_proj" in err
    assert not (tmp_path / "out").exists() and len(list((tmp_path / "out.job" / "parts").iterdir())) == 2


def test_rounding_is_no_fallback_of_rounding(run, tiny, tmp_path, small):
    for scheme in ("fp8", "w8a8", "w2a16"):
        group = ["--group-size", 32] if scheme == "w2a16" else []
        options = ["--scheme", scheme, "--method", "smoothquant", *group, *small]
        record, _, _ = quantized(run, tmp_path / scheme, "--model", tiny("llama"), *options)
        assert {r["fallback"] for r in record["linears"].values()} == {None}


def test_experts_without_tokens_are_counted_and_quantized(run, tmp_path, small):
    source = tiny_models.make("mixtral", tmp_path / "source", num_local_experts=6)
    name = "model.layers.{}.block_sparse_moe.gate.weight"
    routes = {}
    for layer in range(2):  # whatever the sign of the product, two of the first four experts win
        gate = tensor(source, name.format(layer))
        direction = gate[0].clone() * 4
        factors = torch.tensor([2.0, 1.5, -2.0, -1.5, 0.0, 0.0], dtype=gate.dtype)
        routes[name.format(layer)] = factors[:, None] * direction
    model = changed(source, tmp_path / "model", tensors=routes)
    options = ["--scheme", "w4a16", "--method", "gptq", "--group-size", 32, *small]
    record, _, _ = quantized(run, tmp_path / "out", "--model", model, *options)
    for layer in range(2):
        tokens = [
            record["linears"][f"model.layers.{layer}.block_sparse_moe.experts.{e}.w1"]["tokens"] for e in range(6)
        ]
        assert tokens[4:] == [0, 0] and sum(tokens) == 2 * 8 * 32
        assert abs(tokens[0] - tokens[1]) <= 2 and abs(tokens[2] - tokens[3]) <= 2  # a product of zero is a tie
    assert {r["fallback"] for r in record["linears"].values()} == {None}
    assert len(record["linears"]) == 2 * (4 + 18)


# ---- widths ----------------------------------------------------------------------------------------------------


def test_group_that_does_not_divide_gets_its_own_config_group(run, refused, tiny, tmp_path):
    source = tiny("llama")  # widths 64 and 96
    options = ["--model", source, "--scheme", "w4a16", "--group-size", 64]
    refused(3, ("down_proj", "96 input columns", "64", "--strict"), "plan", *options, "--strict")
    code, out, _ = run("plan", *options)
    assert code == 0 and "group size 32: 96 columns are not a multiple of 64" in out
    record, config, _ = quantized(run, tmp_path / "out", *options)
    groups = config["quantization_config"]["config_groups"].values()
    assert {g["weights"]["group_size"] for g in groups} == {64, 32}
    assert record["linears"]["model.layers.1.mlp.down_proj"]["format"]["group"] == 32


def test_prime_width(run, tiny, tmp_path, small):
    model = tiny("llama", intermediate_size=97)
    record, _, said = quantized(run, tmp_path / "out", "--model", model, "--scheme", "w3a16", "--group-size", 32)
    assert record["linears"]["model.layers.0.mlp.down_proj"]["format"]["strategy"] == "channel"
    assert "one scale per channel: 97 columns are not a multiple of 32" in said
    for scheme in ("nvfp4", "mxfp4", "fp8_block"):
        code, _, err = run("plan", "--model", model, "--scheme", scheme, *small)
        assert code == 3 and len(err.strip().splitlines()) == 1
        assert "model.layers.0." in err and "choose another" in err


# ---- checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 1},
        {"num_attention_heads": 0},
        {"hidden_size": "64"},
        {"hidden_size": 128},
        {"intermediate_size": 95},
        {"vocab_size": 4095},
        {"num_key_value_heads": 3},
        {"num_key_value_heads": 4},
        {"head_dim": 8},
        {"model_type": "opt"},
    ],
    ids=str,
)
def test_config_that_does_not_fit_the_file(config, refused, tiny, tmp_path):
    model = changed(tiny("llama"), tmp_path / "model", config)
    err = refused(3, "config", "plan", "--model", model, "--scheme", "w4a16")
    assert (
        next(iter(config)) in err
        or "config.json implies" in err
        or "config.json asks for" in err
        or "this config" in err
        or "config.json counts" in err
    )


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.bias",
    ],
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite(name, bad, refused, tiny, tmp_path):
    source = tiny("qwen2")
    value = tensor(source, name)
    value.view(-1)[3] = bad
    model = changed(source, tmp_path / "model", tensors={name: value})
    said = (name, f"1 of {value.numel()} values are NaN or infinite")
    refused(4, said, "quantize", "--model", model, "--scheme", "w4a16", "--group-size", 32, "--out", tmp_path / "out")


def test_tied_embeddings(run, refused, tiny, tmp_path):
    untied = tiny("llama")
    options = ["--scheme", "w4a16", "--group-size", 32]
    lying = changed(untied, tmp_path / "lying", {"tie_word_embeddings": True})
    refused(3, ("tie_word_embeddings", "differ"), "plan", "--model", lying, *options)
    headless = changed(untied, tmp_path / "headless", tensors={"lm_head.weight": None})
    refused(3, "lm_head.weight", "plan", "--model", headless, *options)
    tied = tiny("llama", tie_word_embeddings=True)
    record, config, said = quantized(run, tmp_path / "tied", "--model", tied, *options)
    assert config["tie_word_embeddings"] is True and "shares its weight with the embeddings" in said
    assert record["tied"] == [["lm_head.weight", "model.embed_tokens.weight"]]
    with safe_open(tmp_path / "tied" / "model.safetensors", "pt") as f:
        assert not [n for n in f.keys() if n.startswith("lm_head")]


def test_input_that_is_quantized_already(run, refused, tiny, tmp_path):
    quantized(run, tmp_path / "once", "--model", tiny("llama"), "--scheme", "w4a16", "--group-size", 32)
    options = ("--scheme", "w4a16", "--group-size", 32)
    _, _, said = quantized(run, tmp_path / "twice", "--model", tmp_path / "once", *options)
    assert "decoded on reading: 14 weights of compressed-tensors int4, group 32" in " ".join(said.split())
    other = changed(tiny("llama"), tmp_path / "gptq", {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    refused(3, ("gptq", "no tensor is stored so"), "plan", "--model", other, "--scheme", "w4a16")
    unknown = changed(tiny("llama"), tmp_path / "bnb", {"quantization_config": {"quant_method": "bitsandbytes"}})
    refused(3, ("bitsandbytes", "dequantize it first"), "plan", "--model", unknown, "--scheme", "w4a16")


def test_single_file_beside_an_index(refused, run, tiny, tmp_path):
    model = changed(tiny("llama"), tmp_path / "model")
    names = load_file(model / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(3, "ambiguous", "plan", "--model", model, "--scheme", "w4a16")
    index["weight_map"] = dict.fromkeys(names, "model.safetensors")  # as mlx_lm writes it
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert run("plan", "--model", model, "--scheme", "w4a16")[0] == 0


@pytest.mark.parametrize("known", [True, False], ids=["known type", "unknown type"])
def test_code_in_a_checkpoint_never_runs(known, run, refused, tiny, tmp_path, small):
    trap = tmp_path / "trap"
    code = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, "trust_remote_code": True}
    model = changed(tiny("llama"), tmp_path / "model", code if known else {**code, "model_type": "evil"})
    (model / "evil.py").write_text(f"open({str(trap)!r}, 'w').close()\nclass Config: ...\nclass Model: ...\n")
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["evil.Model", None]}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    options = ["--scheme", "w4a16", "--method", "gptq", "--group-size", 32, *small]
    if known:
        _, config, _ = quantized(run, tmp_path / "fine", "--model", model, *options)
        assert "auto_map" not in config and "trust_remote_code" not in config
        assert not (tmp_path / "fine" / "evil.py").exists()
    else:
        refused(3, ("model_type 'evil'", "never run"), "plan", "--model", model, *options)
    assert not trap.exists()


def test_an_architecture_that_is_not_declared(run, tmp_path):
    """Found in the module tree."""
    import transformers

    sizes = {"vocab_size": tiny_models.VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes["num_key_value_heads"] = 4
    plain = transformers.StableLmConfig(**sizes, intermediate_size=96, max_position_embeddings=128)
    strange = transformers.GPT2Config(
        vocab_size=tiny_models.VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=128
    )
    for config, name in ((plain, "plain"), (strange, "strange")):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / name)
        tiny_models.add_tokenizer(tmp_path / name)
    options = ["--scheme", "w4a16", "--group-size", 32]
    for name, count in (("plain", 14), ("strange", 8)):
        record, _, _ = quantized(run, tmp_path / f"{name}-out", "--model", tmp_path / name, *options)
        assert len(record["linears"]) == count


# ---- secrets and the network -----------------------------------------------------------------------------------


def test_token_is_nowhere(run, tiny, tmp_path, small, monkeypatch):
    secret = "hf_" + "Secret" * 6
    monkeypatch.setenv("HF_TOKEN", secret)
    options = [
        "--model",
        tiny("llama"),
        "--scheme",
        "w8a8",
        "--method",
        "gptq",
        *small,
        "--json",
        tmp_path / "plan.json",
    ]
    code, out, err = run("quantize", *options, "--out", tmp_path / "out", "--keep-job")
    assert code == 0 and secret not in out + err
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes()


def test_everything_without_a_network(run, tiny, tmp_path, small, no_network):
    out = tmp_path / "out"
    quantized(
        run, out, "--model", tiny("llama"), "--scheme", "w4a16", "--method", "awq+gptq", "--group-size", 32, *small
    )
    text = tmp_path / "text.txt"
    text.write_text(Path(small[1]).read_text())
    assert run("verify", out)[0] == 0
    code, said, err = run("eval", out, "--baseline", tiny("llama"), "--text", text, "--window", 32, "--windows", 8)
    assert code == 0, err
    assert "perplexity" in said


# ---- the plan tells the truth ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", ["--scheme", "w4a16", "--method", "gptq", "--group-size", 64]),
        ("llama", ["--scheme", "w3a16_asym", "--group-size", 48]),
        ("gemma3", ["--scheme", "nvfp4"]),
        ("qwen2", ["--scheme", "w8a16", "--method", "rotate", "--group-size", 32]),
        ("opt", ["--scheme", "fp8"]),
        ("mixtral", ["--scheme", "mxfp4"]),
    ],
    ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else v,
)
def test_plan_knows_the_size_to_the_byte(family, options, run, tiny, tmp_path, small):
    changes = {"tie_word_embeddings": True} if family == "qwen2" else {}
    options = ["--model", tiny(family, **changes), *options, *small]
    assert run("plan", *options, "--json", tmp_path / "plan.json")[0] == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    _, _, said = quantized(run, tmp_path / "out", *options, "--json", tmp_path / "done.json")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    size = sum(t.nbytes for t in stored.values())
    assert plan["coverage"]["bytes_after"] == plan["forecast"]["packed_bytes"] == size
    done = json.loads((tmp_path / "done.json").read_text())
    assert plan["hash"] == done["hash"] and plan["coverage"] == done["coverage"]
    assert f"{plan['coverage']['quantized']} linears quantized" in said


def test_verify_and_its_exit_codes(run, refused, tiny, tmp_path):
    out = tmp_path / "packed"
    quantized(run, out, "--model", tiny("llama"), "--scheme", "w4a16", "--group-size", 32)
    assert run("verify", out)[0] == 0
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-100] ^= 1
    (out / "model.safetensors").write_bytes(data)
    code, said, err = run("verify", out)
    assert code == 4 and "NOT sound" in said and len(err.strip().splitlines()) == 1
    refused(3, "none", "verify", tmp_path / "none")


def test_output_that_is_there(refused, run, tiny, tmp_path):
    out = tmp_path / "taken"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    options = ["--model", tiny("llama"), "--scheme", "w4a16", "--group-size", 32]
    refused(2, ("not empty", "--overwrite"), "quantize", *options, "--out", out)
    refused(2, "input model", "quantize", *options, "--out", tiny("llama"))
    refused(2, "no qkit.json in it", "quantize", *options, "--out", out, "--overwrite")
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    quantized(run, out, *options)
    (out / "notes.txt").write_text("mine")
    options[3] = "w8a16"
    refused(2, "'notes.txt' is not on the list", "quantize", *options, "--out", out, "--overwrite")
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    quantized(run, out, *options, "--overwrite")
    quantized(run, out, *options)  # the finished command again
    assert f"{out}, already complete: " in " ".join(run("quantize", *options, "--out", out)[1].split())


def test_a_report_does_not_take_the_place_of_a_pipe(refused, tiny, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(
        2,
        "that is a device or a pipe",
        "plan",
        "--model",
        tiny("llama"),
        "--scheme",
        "w4a16",
        "--json",
        tmp_path / "pipe",
    )
    assert stat.S_ISFIFO((tmp_path / "pipe").lstat().st_mode)
