"""A refusal says what to do instead: the nearest name, the other verb, the list that has all names."""

import shutil

from qkit.files.embedded import reference_models


def test_convert_says_how_a_gguf_file_is_made(run, tmp_path):
    code, _, err = run("convert", "tiny-llama", "--export", "gguf", "--out", tmp_path / "out")
    assert code == 2 and err.startswith("qkit: --export gguf: convert keeps the codes and scales")
    assert "'qkit quantize --model ORIGINAL --scheme q4_k --out OUT'" in err and len(err.splitlines()) == 1


def test_an_unknown_candidate_names_types_of_gguf_and_the_list(run, tmp_path):
    budget = ["quantize", "--model", "tiny-llama", "--size", "80MB", "--out", tmp_path / "out", "--candidates"]
    code, _, err = run(*budget, "q9_k")
    assert code == 2 and "unknown 'q9_k'" in err
    assert "'qkit list schemes' has all names); did you mean q6_k, q5_k or q4_k?" in err
    assert "did you mean int8, int7 or int6?" in run(*budget, "int9")[2]
    assert "did you mean" not in run(*budget, "zzz")[2]


def test_a_misspelled_reference_model_is_recognised(run):
    code, _, err = run("plan", "--model", "tiny-lama", "--scheme", "w4a16")
    assert code == 3 and err.rstrip().endswith("; did you mean tiny-llama?")
    assert "did you mean" not in run("plan", "--model", "another", "--scheme", "w4a16")[2]


def test_verify_says_what_works_for_a_folder_of_another_tool(run, tmp_path):
    folder = shutil.copytree(reference_models()["tiny-llama"], tmp_path / "other")
    code, said, err = run("verify", folder, "--gpu", "sm90")
    assert code == 2 and said == ""
    assert f"'qkit doctor {folder}' says which GPUs load the folder, and --engine vllm without --gpu runs it" in err
    code, _, err = run("verify", folder)
    assert code == 4 and "if another tool wrote this folder, 'qkit doctor FOLDER' checks it" in err


def test_a_result_that_vllm_refuses_on_a_gpu_says_where_it_loads(run, tmp_path):
    """By the table, without an engine: a warning, and the result stays sound."""
    out = tmp_path / "out"
    assert run("quantize", "--model", "tiny-llama", "--scheme", "w4a8-fp8", "--method", "rtn", "--out", out)[0] == 0
    code, said, _ = run("verify", out, "--gpu", "sm75,sm90")
    assert code == 0 and (
        f"warning: vLLM does not load {out} on sm75: it has no kernel for weights in int4 group 128 and inputs in fp8 dynamic "
        "token; it loads on sm90; transformers + compressed-tensors and qkit load it"
    ) in " ".join(said.split())
    assert "warning:" not in run("verify", out, "--gpu", "sm90")[1]
    assert "inputs fp8_token" in run("doctor", out)[1]
    code, said, err = run("plan", "--model", "tiny-llama", "--scheme", "w4a8-fp8", "--engine", "vllm", "--gpu", "sm75")
    assert (
        code == 3
        and "inputs in fp8_token; it loads on sm90; transformers + compressed-tensors and qkit load it:" in err
    )
    assert "Error:" not in err


def test_a_number_of_gpus_that_cannot_share_the_heads_is_what_is_to_change(run):
    code, _, err = run("plan", "--model", "tiny-llama", "--scheme", "w4a16", "--engine", "vllm", "--tp", 3)
    assert code == 3 and "8 attention heads cannot be shared out to 3 ranks" in err
    assert err.rstrip().endswith(": use another number than --tp 3")


def test_a_folder_of_calibration_data_is_named_as_it_was_given(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("plan", "--model", "tiny-llama", "--scheme", "w4a16", "--method", "gptq", "--calib", ".")
    assert code in (2, 3) and "--calib .: " in err


def test_an_unknown_option_of_a_method_names_those_that_it_has(run):
    plan = ["plan", "--model", "tiny-llama", "--scheme", "w4a16", "--method", "rtn", "--option"]
    assert "unknown option 'damp' for rtn: it has search" in run(*plan, "damp=1")[2]
    of_gptq = "unknown option 'guided' for rtn: it has search, signed; guided is an option of gptq"
    assert of_gptq in " ".join(run(*plan, "guided=true")[2].split())
    assert "unknown option 'serch' for rtn; did you mean search?" in run(*plan, "serch=mse")[2]
