"""qkit recommend: bytes are those of the files, what is recommended fits and is loaded, and its commands are complete."""

import importlib.util
import json
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qkit.files.safefile import read_header
from qkit.planning.measured_losses import FILE, measured_losses
from qkit.tensor.formats import scheme
from qkit.workflows.machines import VLLM_SHARE
from qkit.workflows.recommend import recommend
from qkit.workflows.recommendation import NEGLIGIBLE, Candidate, choose

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import sweep_configs

REPORTS = Path(__file__).parents[2] / "reports"
LAYERS, KEY_HEADS, HEAD = 2, 2, 16  # of tiny("llama")


@pytest.fixture
def advised(run, tiny, tmp_path):
    """``advised(*options)``: what the command says of a tiny llama, from its JSON file."""

    def go(*options, model=None) -> dict:
        file = tmp_path / "recommend.json"
        code, out, err = run("recommend", "--model", model or tiny("llama"), *options, "--json", file)
        assert code == 0, err
        data = json.loads(file.read_text())
        assert all(f"  {command}\n" in out for command in data["commands"])
        return data

    return go


def of_scheme(data: dict, name: str) -> dict:
    return next(c for c in data["candidates"] if c["scheme"] == name)


def test_the_weights_have_as_many_bytes_as_the_file_that_the_command_makes(advised, run, tmp_path, monkeypatch, small):
    monkeypatch.chdir(tmp_path)
    data = advised("--memory", "1GB", "--context", 64, "--engine", "vllm")
    make, prove, serve = (shlex.split(c) for c in data["commands"])
    assert data["chosen"]["loss"] <= NEGLIGIBLE and data["chosen"]["fits"]
    assert run(*make[1:], *small)[0] == 0
    made = tmp_path / make[-1] / "model.safetensors"
    assert sum(t.nbytes for t in read_header(made).values()) == data["chosen"]["weights"]
    assert prove == ["qkit", "verify", make[-1]] and run(*prove[1:])[0] == 0
    assert serve == ["vllm", "serve", make[-1], "--max-model-len", "64"]


def test_memory_decides_and_the_cache_becomes_narrower_last(advised, run, tiny):
    """On a CPU the whole memory counts, so that a byte decides."""
    cpu = ("--engine", "vllm", "--device", "cpu", "--context", 64)
    least = of_scheme(advised(*cpu, "--memory", "1GB"), "W4A16")
    plain = 2 * 2 * KEY_HEADS * HEAD * LAYERS * 64
    assert least["cache"] == "auto" and least["cache_bytes"] == plain
    same = of_scheme(advised(*cpu, "--memory", f"{least['total']}B"), "W4A16")
    assert same["fits"] and same["cache"] == "auto" and same["loss"] == measured_losses().schemes["W4A16"]
    less = of_scheme(advised(*cpu, "--memory", f"{least['total'] - 1}B"), "W4A16")
    assert less["fits"] and less["cache"] == "fp8" and less["cache_bytes"] == plain // 2
    assert less["loss"] == pytest.approx(same["loss"] + measured_losses().caches["fp8"])
    code, _, err = run("recommend", "--model", tiny("llama"), *cpu, "--memory", "1KB")
    assert code == 3 and err.count("\n") == 1 and "no scheme fits" in err and "use --memory 2MB or more" in err


def test_a_narrow_cache_goes_into_the_commands(advised):
    cpu = ("--engine", "vllm", "--device", "cpu", "--context", 64)
    rows = advised(*cpu, "--memory", "1GB")["candidates"]
    smallest = min((c for c in rows if not c["refused"]), key=lambda c: c["total"])
    make, _, serve = advised(*cpu, "--memory", f"{smallest['total'] - 1}B")["commands"]
    assert " --kv fp8 " in make and serve.endswith("--kv-cache-dtype fp8")


def test_kernels_are_those_of_the_device_and_what_it_refuses_is_left_out(advised, run, tiny):
    wide = tiny("llama", hidden_size=128, intermediate_size=256)
    on = {d: advised("--device", d, "--context", 64, model=wide)["candidates"] for d in ("rtx4090", "b200")}
    rows = {d: {c["scheme"]: c for c in found} for d, found in on.items()}
    assert rows["rtx4090"]["W4A16"]["kernels"] == ["MarlinLinearKernel"]
    assert "W8A8" in {name for name, c in rows["b200"].items() if c["refused"]}  # no INT8 products on Blackwell
    assert all(not c["fits"] for c in rows["b200"].values() if c["refused"])


def test_llama_cpp_gets_types_of_gguf(advised):
    pytest.importorskip("gguf")
    data = advised("--engine", "llama.cpp", "--memory", "1GB", "--context", 64)
    assert data["candidates"] and all(scheme(c["scheme"]).weights.gguf for c in data["candidates"])
    assert data["commands"][-1].startswith("llama-server --model ") and "--engine" not in data["commands"][0]


def test_transformers_expands_what_is_packed(advised):
    data = advised("--engine", "transformers", "--memory", "1GB", "--context", 64)
    assert {c["weights"] for c in data["candidates"] if not c["refused"]} == {data["plain"]["weights"]}
    assert (
        data["chosen"] == data["plain"] and data["why"].startswith("the model fits as it is") and not data["commands"]
    )


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--context", 64), "add --memory"),
        (("--memory", "1GB", "--context", 10**6), "positions"),
        (("--device", "gtx", "--context", 64), "expected one of cpu, t4"),
        (("--memory", "much", "--context", 64), "--memory much"),
        (("--memory", "8", "--context", 64), "write 8GB or 8MB"),
        (("--memory", "8GB", "--engine", "llama.cpp", "--tp", 2), "use --engine vllm"),
    ],
)
def test_a_machine_that_makes_no_sense_is_refused_in_a_sentence(run, tiny, options, part):
    code, _, err = run("recommend", "--model", tiny("llama"), *options)
    assert code == 2 and part in err and err.count("\n") == 1


def test_a_diffusion_pipeline_is_refused(run):
    code, _, err = run("recommend", "--model", "tiny-video", "--memory", "1GB", "--context", 16)
    assert code == 3 and "language models" in err


def test_a_profile_gives_losses_of_the_model_and_a_mix(run, tiny, tmp_path, small, advised):
    folder = tmp_path / "profile"
    arguments = ("--candidates", "w3a16,w4a16,w8a16", "--rows", 4, "--points", 2, "--measures", "kl")
    assert run("profile", "--model", tiny("llama"), "--out", folder, *arguments, *small)[0] == 0
    gpu = ("--engine", "vllm", "--context", 64, "--profile", folder)
    rows = {c["scheme"]: c for c in advised(*gpu, "--memory", "1GB")["candidates"]}
    assert rows["W3A16"]["loss"] > rows["W4A16"]["loss"] > rows["W8A16"]["loss"]
    wide = rows["W8A16"]
    room = wide["activations"] + wide["cache_bytes"] // 2 + wide["weights"] - 64  # with a cache in FP8 it almost fits
    data = advised(*gpu, "--memory", f"{int(room / VLLM_SHARE) + 1}B")
    mixed = of_scheme(data, "mixed")
    assert data["chosen"] == mixed and mixed["total"] <= data["usable"]
    assert rows["W3A16"]["weights"] < mixed["weights"] < wide["weights"] and mixed["loss"] < rows["W4A16"]["loss"]
    make = shlex.split(data["commands"][0])
    assert run("plan", *make[2:], *small)[0] == 0


def test_the_profile_of_another_model_is_refused(run, tiny, tmp_path, small):
    folder = tmp_path / "profile"
    arguments = ("--candidates", "w4a16,w8a16", "--rows", 4, "--points", 2, "--measures", "kl")
    assert run("profile", "--model", tiny("llama"), "--out", folder, *arguments, *small)[0] == 0
    code, _, err = run("recommend", "--model", tiny("qwen2"), "--memory", "1GB", "--profile", folder)
    assert code == 3 and "of another model" in err


def test_without_a_context_a_short_model_gets_its_own(advised):
    assert advised("--memory", "1GB")["context"] == 128


def test_a_cache_in_eight_bits_is_tried_in_llama_cpp(advised):
    pytest.importorskip("gguf")
    cpp = ("--engine", "llama.cpp", "--context", 64)
    wide = max(advised(*cpp, "--memory", "1GB")["candidates"], key=lambda c: c["total"])
    found = of_scheme(advised(*cpp, "--memory", f"{wide['total'] - 1}B"), wide["scheme"])
    assert found["fits"] and found["cache"] == "q8_0" and found["cache_bytes"] == wide["cache_bytes"] * 17 // 32


def test_the_smallest_with_a_negligible_loss_else_the_least_loss():
    good = Candidate(scheme="A", weights=10, loss=NEGLIGIBLE / 2, fits=True)
    better = Candidate(scheme="B", weights=20, loss=NEGLIGIBLE / 9, fits=True)
    bad = Candidate(scheme="C", weights=5, loss=NEGLIGIBLE * 9, fits=True)
    assert choose([better, bad, good])[0] == good
    assert choose([replace(better, fits=False), replace(good, fits=False), bad])[0] == bad
    assert choose([replace(bad, loss=NEGLIGIBLE * 3, weights=6), bad])[0].weights == 6
    assert choose([Candidate(scheme="D", refused="why")]) == (None, "every scheme is left out")


def test_what_does_not_fit_is_told_what_would(advised, run, tiny):
    """The memory and the context of the sentence: with them something fits, with less it does not."""
    wide = tiny("llama", max_position_embeddings=4096)
    cpu = ("--engine", "vllm", "--device", "cpu")
    code, _, err = run("recommend", "--model", wide, *cpu, "--memory", "2MB", "--context", 4096)
    assert code == 3
    memory, context = re.search(r"use --memory (\S+) or more, or --context (\d+) or less", err).groups()
    assert advised(*cpu, "--memory", memory, "--context", 4096, model=wide)["chosen"]
    assert advised(*cpu, "--memory", "2MB", "--context", context, model=wide)["chosen"]
    assert run("recommend", "--model", wide, *cpu, "--memory", "2MB", "--context", int(context) + 1)[0] == 3


def test_a_scheme_that_almost_fits_is_named(advised):
    cpu = ("--engine", "vllm", "--device", "cpu", "--context", 64)
    least = min(
        (c for c in advised(*cpu, "--memory", "1GB")["candidates"] if not c["refused"]), key=lambda c: c["loss"]
    )
    less = least["total"] - least["cache_bytes"] // 2 - 1
    data = advised(*cpu, "--memory", f"{less}B")
    assert any(
        n.startswith(f"{least['scheme']} would lose ") and n.endswith("needs 0.00 MB more") for n in data["notes"]
    )


def test_gpus_that_share_a_model(advised):
    """Two GPUs have twice the memory, and keys of a model with fewer heads than GPUs are in each."""
    gpu = ("--device", "h100", "--context", 64)
    one, four = advised(*gpu), advised(*gpu, "--tp", 4)
    assert four["usable"] == pytest.approx(4 * one["usable"], abs=4) and four["gpus"] == 4
    assert four["chosen"]["cache_bytes"] == 4 // KEY_HEADS * one["chosen"]["cache_bytes"]
    assert " --tp 4 " in four["commands"][0] and four["commands"][-1].endswith("--tensor-parallel-size 4")


def test_schemes_without_a_measured_loss_are_named(advised):
    note = next(n for n in advised("--memory", "1GB", "--context", 64)["notes"] if n.startswith("not compared"))
    assert "W2A16" in note and "W4A16," not in note and "Q2_K" not in note


def test_the_losses_are_those_of_the_reports():
    spec = importlib.util.spec_from_file_location("losses", REPORTS / "comparison" / "losses.py")
    losses = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(losses)
    assert json.loads(FILE.read_text()) == losses.losses()


# ---- before the weights are here ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "engine"),
    [
        ("llama", "llama.cpp"), ("llama", "vllm"), ("mixtral", "vllm"), ("gemma", "vllm"), ("qwen3_moe", "vllm"),
        ("gpt_oss", "transformers"),
    ],
)  # fmt: skip
def test_a_config_alone_gives_the_figures_of_the_weights(architecture, engine, tmp_path):
    whole, alone = tmp_path / "whole", tmp_path / "alone"
    sweep_configs.save("causal", architecture, whole)
    shutil.copytree(whole, alone, ignore=shutil.ignore_patterns("*.safetensors*"))
    files = sorted(alone.iterdir())
    found = (json.dumps(recommend(str(m), 64, "1GB", engine).to_json()) for m in (whole, alone))
    of_weights, of_config = map(json.loads, found)
    assert of_config["notes"][0].startswith("the weights are not here")
    of_config["notes"] = of_config["notes"][1:]
    assert str(alone) in json.dumps(of_config["commands"]) or of_config["chosen"] is None
    assert json.loads(json.dumps(of_config).replace(str(alone), str(whole)).replace("alone-", "whole-")) == of_weights
    assert sorted(alone.iterdir()) == files


def test_a_model_of_70_billion_weights_takes_no_disk(advised, tmp_path):
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
        "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 80, "vocab_size": 128256,
        "max_position_embeddings": 131072, "dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(json.dumps(config))
    data = advised("--memory", "48GB", "--engine", "vllm", model=tmp_path / "large")
    assert data["plain"]["weights"] == 2 * 70_553_706_496 and data["chosen"]["scheme"] == "W4A16"
    assert "depends on the tokenizer, which is not here" in of_scheme(data, "NVFP4")["refused"]


def test_a_config_of_a_quantized_model_says_too_little(run, tmp_path, tiny):
    shutil.copytree(tiny("llama"), tmp_path / "q", ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    (tmp_path / "q" / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    code, _, err = run("recommend", "--model", tmp_path / "q", "--memory", "1GB")
    assert code == 3 and "a config alone does not tell those of a quantized model" in err


def test_of_a_model_on_the_hub_the_small_files_are_fetched(monkeypatch, tiny, tmp_path, advised):
    import huggingface_hub

    asked = {}
    shutil.copytree(tiny("llama"), tmp_path / "snapshot", ignore=shutil.ignore_patterns("*.safetensors*"))
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **more: asked.update(more) or str(tmp_path / "snapshot"),
    )
    data = advised("--memory", "1GB", "--context", 64, "--engine", "vllm", model="me/tiny")
    names = ["config.json", "tokenizer.json", "model.safetensors", "model-00001-of-00002.safetensors"]
    kept = huggingface_hub.utils.filter_repo_objects(names, ignore_patterns=asked["ignore_patterns"])
    assert list(kept) == names[:2]
    assert data["commands"][0].startswith("qkit quantize --model me/tiny ")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"tokenizer.json": "{}", "tokenizer_config.json": "{}"}, "no config.json, which says what the model is"),
        (
            {"config.json": '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'},
            "config.json has no hidden_size",
        ),
        ({"config.json": "{}"}, "model_type"),
        (
            {"config.json": '{"model_type": "gpt2", "n_embd": 64, "n_head": 4, "vocab_size": 100}'},
            "config.json has no n_layer",
        ),
    ],
    ids=["tokenizer", "no sizes", "empty", "other names"],
)
def test_what_does_not_say_how_large_a_model_is(files, said, run, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    code, _, err = run("recommend", "--model", tmp_path, "--memory", "1GB")
    assert code == 3 and said in err and len(err.strip().splitlines()) == 1


def test_the_folder_may_be_the_one_that_one_is_in(advised, tmp_path, tiny, monkeypatch, run):
    shutil.copytree(tiny("llama"), tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors*"))
    monkeypatch.chdir(tmp_path / "m")
    there, elsewhere = (
        advised("--memory", "1GB", "--context", 64, "--engine", "vllm", model=m) for m in (".", tmp_path / "m")
    )
    assert there["plain"] == elsewhere["plain"]
    config = json.loads(Path("config.json").read_text())
    Path("config.json").write_text(json.dumps({**config, "model_type": "bert", "architectures": ["BertModel"]}))
    code, _, err = run("recommend", "--model", tmp_path / "m", "--memory", "1GB")
    assert code == 3 and f"{tmp_path / 'm'}: " in err and "qkit-" not in err.replace(str(tmp_path), "")


def test_weights_that_qkit_does_not_read_are_none(advised, tmp_path, tiny):
    shutil.copytree(tiny("llama"), tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors*"))
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"pickle")
    data = advised("--memory", "1GB", "--context", 64, "--engine", "vllm", model=tmp_path / "m")
    assert data["plain"] == advised("--memory", "1GB", "--context", 64, "--engine", "vllm")["plain"]


def test_llama_cpp_keeps_what_is_behind_a_window_that_it_does_not_have(tmp_path):
    pytest.importorskip("gguf")
    sweep_configs.save("causal", "mistral", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "sliding_window": 16}))
    narrow, whole = (recommend(str(tmp_path / "m"), 64, "1GB", engine).plain for engine in ("vllm", "llama.cpp"))
    assert whole.cache_bytes == 4 * narrow.cache_bytes
