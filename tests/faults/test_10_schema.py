"""Point 10: what is read from a file is checked against a schema, and complaints are one sentence that names the field."""

import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import qkit_data

from qkit.errors import BadCheckpoint, BadRecipe, QkitError
from qkit.files.foreign import foreign_errors
from qkit.files.locate import find_model, recorded_source
from qkit.planning.recipe import load_recipe
from qkit.runtime.loading import load, load_tokenizer
from qkit.sensitivity.profile import Profile
from qkit.workflows.quantize import open_structure

DEEP = "[" * 100_000 + "]" * 100_000


def changed(source, folder, name, **fields):
    """A copy of a model folder with fields of one of its files changed."""
    shutil.copytree(source, folder)
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


@pytest.mark.parametrize(
    "field, value",
    [
        ("id2label", 0),
        ("dtype", "x"),
        ("torch_dtype", 3),
        ("text_config", {}),
        ("text_config", 7),
        ("model_type", []),
        ("pad_token_id", 2147483648),
        ("eos_token_id", "x"),
        ("architectures", "LlamaForCausalLM"),
        ("rope_parameters", [1]),
        ("tie_word_embeddings", "yes"),
        ("max_position_embeddings", "128"),
        ("layer_types", {"a": 1}),
        ("hidden_act", ["silu"]),
        ("rms_norm_eps", {"a": 1}),
    ],
)
def test_config_json(tiny, tmp_path, field, value):
    folder = changed(tiny("llama"), tmp_path / "m", "config.json", **{field: value})
    with pytest.raises(QkitError) as e:
        open_structure(str(folder))
    assert "config.json" in str(e.value) and len(str(e.value)) < 700


@pytest.mark.parametrize("field", ["id2label", "pad_token_id", "text_config"])
def test_the_field_is_named(tiny, tmp_path, field):
    folder = changed(tiny("llama"), tmp_path / "m", "config.json", **{field: "wrong"})
    with pytest.raises(BadCheckpoint, match=f"{field} is 'wrong', expected "):
        open_structure(str(folder))


@pytest.mark.parametrize(
    "text", ["{}", "[]", "", '{"model": 5}', "\0", DEEP, '{"version": "1.0", "model": {"type": "BPE"}}']
)
def test_tokenizer_json(tiny, tmp_path, text):
    folder = tmp_path / "m"
    shutil.copytree(tiny("llama"), folder)
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(BadCheckpoint, match="no tokenizer that transformers can load"):
        load_tokenizer(folder)


@pytest.fixture(scope="module")
def packed(tmp_path_factory, tiny, calib, quiet):
    from qkit.workflows.quantize import Request, quantize

    out = tmp_path_factory.mktemp("packed") / "out"
    quantize(Request(model=str(tiny("llama")), scheme="w4a16", group_size=32, threads=1), out, quiet)
    return out


@pytest.mark.parametrize(
    "value",
    [
        0,
        "x",
        [],
        {},
        {"config_groups": []},
        {"config_groups": {"g": 1}},
        {"config_groups": {"g": {"targets": ["Linear"]}}},
        {"config_groups": {"g": {"targets": "Linear", "weights": {}}}},
        {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": "four"}}}},
        {"config_groups": {"g": {"targets": [5], "weights": {"num_bits": 4}}}},
        {"config_groups": {"g": {"targets": ["re:("], "weights": {"num_bits": 4, "strategy": "channel"}}}},
        {"config_groups": {}, "ignore": 5},
        {"config_groups": {}, "kv_cache_scheme": "fp8"},
        {"config_groups": {}, "sparse": 1},
        {"config_groups": {}, "rotated": []},
        {"quant_method": "gptq", "bits": 4},
    ],
)
def test_quantization_config_at_load(packed, tmp_path, value):
    folder = changed(packed, tmp_path / "m", "config.json", quantization_config=value)
    with pytest.raises(QkitError):
        load(folder)


def test_another_methods_checkpoint_is_named(packed, tmp_path):
    folder = changed(packed, tmp_path / "m", "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(BadCheckpoint, match="'gptq' does not store so"):
        load(folder)


@pytest.mark.parametrize("text", ["[]", "", "{", '{"source": 5}', '{"source": {"fingerprint": []}}', DEEP])
def test_qkit_json(packed, tmp_path, text):
    folder = tmp_path / "m"
    shutil.copytree(packed, folder)
    (folder / "qkit.json").write_text(text)
    for use in (recorded_source, load):
        with pytest.raises(BadCheckpoint, match=r"qkit\.json"):
            use(folder)


@pytest.mark.parametrize(
    "value", [5, {"kind": "kivi"}, {"kind": "kivi", "widths": [2], "group": "x"}, {"kind": [], "widths": [2]}]
)
def test_a_cache_policy_in_qkit_json(packed, tmp_path, value):
    with pytest.raises(QkitError):
        load(changed(packed, tmp_path / "m", "qkit.json", kv=value))


@pytest.mark.parametrize(
    "value",
    [{"eos_token_id": "x"}, {"pad_token_id": 2**70}, {"temperature": []}, {"num_beams": -3}, {"output_scores": "y"}],
)
def test_generation_config(packed, tmp_path, value):
    folder = changed(packed, tmp_path / "m", "generation_config.json", **value)
    with pytest.raises(BadCheckpoint, match=r"generation_config\.json"):
        load(folder)


@pytest.mark.parametrize(
    "rules", ["true", "5", "x", "{a: 1}", "[5]", "[[a]]", "[{match: 5}]", "[{match: []}]", "[{match: a, options: 3}]"]
)
def test_recipe_rules(tmp_path, rules):
    file = tmp_path / "r.yaml"
    file.write_text(f"scheme: w4a16\nrules: {rules}\n")
    with pytest.raises(BadRecipe, match=r"r\.yaml"):
        load_recipe(file, {})


@pytest.mark.parametrize(
    "field, value",
    [
        ("request", None),
        ("request", []),
        ("request", {"method": "rtn"}),
        ("units", {}),
        ("units", [5]),
        ("units", [{"key": [], "linears": ["a"], "weights": 1, "choices": {}}]),
        ("fixed_bytes", "x"),
        ("base_loss", None),
        ("candidates", 3),
        ("candidates", ["W4A16"]),
        ("measures", ["other"]),
        ("whole", 5),
        ("fingerprint", 1),
    ],
)
def test_profile(tmp_path, field, value):
    request = {"method": "rtn", "group_sizes": {"W8A16": 32}, "outliers": {"W8A16": 0.0}}
    unit = {"key": "a", "linears": ["a"], "weights": 64, "choices": {"W8A16": {"bytes": 9, "costs": {"kl": 0.1}}}}
    sound = {
        "version": 3, "fingerprint": "f", "request": request, "candidates": ["W8A16"], "measures": ["kl"], "base_loss": 1.0,
        "fixed_bytes": 5, "units": [unit], "whole": {},
    }  # fmt: skip
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(sound))
    assert Profile.load(tmp_path).fixed_bytes == 5
    file.write_text(json.dumps({**sound, field: value}))
    with pytest.raises(QkitError, match=r"profile\.json: damaged"):
        Profile.load(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        DEEP,
        '{"image": "a\\u0000b.png", "question": "q", "answer": "a"}',
        '{"image": 5, "question": "q", "answer": "a"}',
        '{"image": "", "question": "q", "answer": "a"}',
        '{"image": "' + "a" * 300 + '", "question": "q", "answer": "a"}',
        '{"image": [], "question": "q", "answer": "a"}',
        '{"image": "a.png", "question": null, "answer": "a"}',
        '{"image": "a.png", "question": "q", "question": "r", "answer": "a"}',
        '{"image": "a.png", "question": "q", "answer": NaN}',
    ],
)
def test_pairs(tmp_path, line):
    """Of a line, one complaint."""
    from PIL import Image

    from qkit.calibration.image_text import read_image_text
    from qkit.errors import BadCalibration

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "p.jsonl").write_text(line + "\n")
    with pytest.raises(BadCalibration, match="line 1"):
        read_image_text(tmp_path / "p.jsonl", 1)


def test_a_picture_that_fills_the_memory(tmp_path):
    from PIL import Image

    from qkit.calibration.image_text import read_image_text
    from qkit.errors import BadCalibration

    Image.new("1", (12_000, 12_000)).save(tmp_path / "a.png")
    (tmp_path / "p.jsonl").write_text('{"image": "a.png", "question": "q", "answer": "a"}')
    with pytest.raises(BadCalibration, match="12000 x 12000 pixels"):
        read_image_text(tmp_path / "p.jsonl", 1)


@pytest.mark.parametrize("out", [".", "..", "/", "", os.fsdecode(b"a\xffb")])
def test_names_of_outputs(run, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("quantize", "--model", "tiny-llama", "--scheme", "w4a16", "--out", out)
    assert code == 2 and len(err.strip().splitlines()) == 1 and "fault of qkit" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", ["evil/..", "../..x", "a/b/c", "\0", "a b/c", "evil/" + "x" * 300, "", "-/-"])
def test_names_of_models(no_network, model):
    with pytest.raises(BadCheckpoint):
        find_model(model)


def test_a_limit_of_memory_is_one_sentence(tmp_path):
    """Whatever the limit, from one that does not hold the libraries to one that holds the run."""
    code = (
        "import importlib, resource, sys\n"
        "importlib.import_module(sys.argv[3])\n"
        "from qkit.commands import main\n"
        "mapped = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (mapped + (int(sys.argv[1]) << 20),) * 2)\n"
        "main(['quantize', '--model', 'tiny-llama', '--scheme', 'w4a16', '--threads', '1', '--out', sys.argv[2]])\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for extra, loaded in (
        (60, "qkit.commands.quantize"),
        (8, "qkit.workflows.quantize"),
        (60, "qkit.workflows.quantize"),
    ):
        command = [sys.executable, "-c", code, str(extra), str(tmp_path / "out"), loaded]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert "Traceback" not in done.stderr and done.returncode in (0, 3, 5), done.stderr
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_foreign_turns_everything_but_errors_of_qkit():
    class Panic(BaseException):
        pass

    for failure in (ValueError("a\nb"), MemoryError(), RecursionError(), Panic("p"), OSError("x"), KeyError("k")):
        with (
            pytest.raises(BadCheckpoint, match="file: reading it fails: ") as e,
            foreign_errors("file: reading it fails"),
        ):
            raise failure
        assert "\n" not in str(e.value)
    for kept in (BadRecipe("r"), KeyboardInterrupt(), SystemExit()):
        with pytest.raises(type(kept)), foreign_errors("file"):
            raise kept


def test_a_fault_of_qkit_is_one_sentence(run, monkeypatch):
    def fails(*arguments, **options):
        raise LookupError("a surprise\nof two lines")

    monkeypatch.setattr("qkit.commands.verify.verify", fails)
    code, _, err = run("verify", str(qkit_data.model_path("tiny-llama")))
    assert (
        code == 1
        and err
        == "qkit: LookupError: a surprise: this is a fault of qkit: please report it with the output of 'qkit --debug ..'\n"
    )
