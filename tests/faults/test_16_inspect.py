"""qkit inspect: what is in a folder or a file, from headers alone, and never a traceback."""

import json
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qkit.errors import QkitError
from qkit.files.gguf import read_gguf
from qkit.files.inspect import inspect

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def packed(tmp_path_factory, tiny):
    from conftest import Quiet

    from qkit.workflows.quantize import Request, quantize

    out = tmp_path_factory.mktemp("packed") / "out"
    quantize(Request(model=str(tiny("llama")), scheme="w4a16", group_size=32), out, Quiet())
    return out


# ---- GGUF files ------------------------------------------------------------------------------------------------


def string(text):
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf(tensors=(), values=(), version=3, cut=None):
    """A GGUF file; tensors: (name, shape, type, bytes of data); values: (key, type, raw value)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(values))
    for key, kind, raw in values:
        head += string(key) + struct.pack("<I", kind) + raw
    at = 0
    for name, shape, kind, size in tensors:
        head += string(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in shape)
        head += struct.pack("<IQ", kind, at)
        at += size + -size % 32
    data = head + bytes(-len(head) % 32) + bytes(at)
    return data if cut is None else data[:cut]


TENSORS = [("token_embd.weight", (64, 32), 1, 4096), ("blk.0.ffn_up.weight", (256, 32), 12, 4608), ("n", (64,), 0, 256)]
VALUES = [
    ("general.architecture", 8, string("llama")),
    ("general.name", 8, string("a \x1b[31mname")),
    ("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 300) + string("x") * 300),
    ("tokenizer.ggml.scores", 9, struct.pack("<IQ", 6, 300) + bytes(1200)),
    ("general.alignment", 4, struct.pack("<I", 32)),
]


def test_a_gguf_file(run, tmp_path):
    (tmp_path / "m.gguf").write_bytes(gguf(TENSORS, VALUES))
    code, said, err = run("inspect", tmp_path / "m.gguf", "--json", tmp_path / "i.json")
    assert code == 0, err
    found = json.loads((tmp_path / "i.json").read_text())
    assert found["kind"] == "GGUF file" and found["model_type"] == "llama" and found["tensors"] == 3
    assert found["by_dtype"] == {"F16": [1, 4096], "Q4_K": [1, 4608], "F32": [1, 256]}
    assert found["bits"] == pytest.approx(8 * (4096 + 4608 + 256) / (64 * 32 + 256 * 32 + 64))
    assert "Q4_K" in said and "\x1b" not in said and "4.6" not in err
    code, _, err = run("inspect", tmp_path)  # a folder of nothing else
    assert code == 0, err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "ends within the magic"),
        (b"GGUF", "ends within the version"),
        (gguf(version=1), "version 1, expected 2 or 3"),
        (gguf(version=3 << 24), "version 50331648"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 63, 0), "expected at most 200000"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 63), "expected at most 200000 and 65536"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62), "a key has 4611686018427387904 bytes"),
        (gguf(values=[("a", 77, b"")]), "has type 77"),
        (gguf(values=[("a", 4, bytes(4))] * 2), "is there twice"),
        (gguf(values=[("a", 9, struct.pack("<IQ", 4, 1 << 60))]), "ends within"),
        (gguf(values=[("a", 9, struct.pack("<IQ", 8, 1 << 60))]), "expected at most 4000000"),
        (gguf(values=[("a", 9, struct.pack("<IQ", 9, 1) * 5)]), "expected one of 0 to 12"),
        (gguf(values=[("a", 8, struct.pack("<Q", 1) + b"\xff")]), "is not UTF-8"),
        (gguf(values=[("general.alignment", 4, bytes(4))]), "general.alignment is 0"),
        (gguf([("t", (1,) * 9, 0, 4)]), "has 9 axes"),
        (gguf([("t", (33,), 2, 18)]), "no whole blocks of 32"),
        (gguf([("t", (1 << 50,), 0, 4)]), "is too large"),
        (gguf([("t", (32,), 0, 128)] * 2), "the same name"),
        (gguf(TENSORS, cut=-200), "cut short"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_gguf_files_that_are_damaged(content, said, run, tmp_path):
    (tmp_path / "m.gguf").write_bytes(content)
    code, _, err = run("inspect", tmp_path / "m.gguf")
    assert code == 3 and said in err and err.count("\n") == 1, err


def test_mutated_gguf_files(tmp_path):
    random.seed(0)
    sound = gguf(TENSORS, VALUES)
    file = tmp_path / "m.gguf"
    refused = 0
    for _ in range(600):
        data = bytearray(sound[: random.choice([len(sound), random.randrange(len(sound))])])
        for _ in range(random.randrange(4)):
            if data:
                data[random.randrange(min(len(data), 900))] = random.choice(
                    [0, 1, 127, 128, 255, random.randrange(256)]
                )
        file.write_bytes(data)
        try:
            read_gguf(file)
        except QkitError:
            refused += 1
    assert refused > 200


# ---- folders ---------------------------------------------------------------------------------------------------


def test_a_result_of_qkit(run, packed, tmp_path):
    code, said, err = run("inspect", packed, "--json", tmp_path / "i.json")
    assert code == 0, err
    found = json.loads((tmp_path / "i.json").read_text())
    assert found["kind"] == "model folder" and found["model_type"] == "llama" and not found["damaged"]
    assert found["quantization"] == [
        "compressed-tensors: weights INT4 by group of 32, activations as they are, stored as pack-quantized"
    ]
    assert found["made_by"] == "qkit 0.1.0 (w4a16, rtn)" and "tokenizer.json" in found["side_files"]
    config = json.loads((packed / "config.json").read_text())
    linears = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    assert found["weights"] == linears + 2 * config["vocab_size"] * 64 + 5 * 64
    assert "million weights" in said and "qkit 0.1.0" in said


def foreign(folder, tensors, quantization, **more):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization} | more))
    return folder


def test_results_of_other_tools(run, tmp_path):
    i32, u8, f16, f8 = torch.int32, torch.uint8, torch.float16, torch.float8_e4m3fn
    name = "model.layers.0.mlp.up_proj"
    gptq = {
        f"{name}.qweight": torch.zeros(8, 16, dtype=i32), f"{name}.qzeros": torch.zeros(2, 2, dtype=i32),
        f"{name}.scales": torch.zeros(2, 16, dtype=f16), f"{name}.g_idx": torch.zeros(64, dtype=i32),
    }  # fmt: skip
    cases = {
        "gptq": (
            gptq,
            {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "meta": {"quantizer": ["gptqmodel:5"]}},
            ("gptq: bits 4, group_size 32", "gptqmodel:5", 64 * 16),
        ),
        "awq": (
            {f"{name}.qweight": torch.zeros(64, 2, dtype=i32), f"{name}.scales": torch.zeros(2, 16, dtype=f16)},
            {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True},
            ("awq: bits 4, group_size 32, zero_point True", None, 64 * 16),
        ),
        "bnb": (
            {f"{name}.weight": torch.zeros(512, 1, dtype=u8), f"{name}.weight.absmax": torch.zeros(16),
             f"{name}.weight.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=u8)},
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            ("bitsandbytes: load_in_4bit True, bnb_4bit_quant_type nf4", None, 1024),
        ),
        "fp8": (
            {f"{name}.weight": torch.zeros(16, 64).to(f8), f"{name}.weight_scale_inv": torch.zeros(1, 1)},
            {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
            ("fp8: weight_block_size [128, 128], activation_scheme dynamic", None, 1024),
        ),
        "modelopt": (
            {f"{name}.weight": torch.zeros(16, 32, dtype=u8), f"{name}.weight_scale_2": torch.zeros(1)},
            {"quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt", "version": "0.33"}},
            ("modelopt: quant_algo NVFP4", "modelopt 0.33", 1024),
        ),
        "autoround": (
            gptq, {"quant_method": "auto-round", "bits": 4, "autoround_version": "0.9"},
            ("auto-round", "AutoRound 0.9", 1024),
        ),
        "mlx": (
            {f"{name}.weight": torch.zeros(16, 6, dtype=torch.uint32), f"{name}.scales": torch.zeros(16, 2),
             f"{name}.biases": torch.zeros(16, 2)},
            {"quant_method": "mlx", "bits": 3, "group_size": 32, "mode": "affine"},
            ("mlx: bits 3, group_size 32, mode affine", None, 1024),
        ),
        "ct": (
            {f"{name}.weight_packed": torch.zeros(16, 8, dtype=i32), f"{name}.weight_shape": torch.tensor([16, 64])},
            {"quant_method": "compressed-tensors", "version": "0.12", "config_groups": {"g": {"format": "pack-quantized",
             "weights": {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": False}}}},
            ("compressed-tensors: weights INT4 by channel, asymmetric", "a tool that writes compressed-tensors 0.12", 1024),
        ),
    }  # fmt: skip
    for case, (tensors, said, (line, maker, weights)) in cases.items():
        folder = foreign(tmp_path / case, tensors, said)
        code, _, err = run("inspect", folder, "--json", tmp_path / "i.json")
        found = json.loads((tmp_path / "i.json").read_text())
        assert code == 0, (case, err)
        assert found["quantization"][0].startswith(line), (case, found["quantization"])
        assert found["weights"] == weights, case
        assert maker is None or found["made_by"] == maker, case


def test_a_quantization_config_of_another_type(run, tmp_path):
    folder = foreign(tmp_path / "m", {"a.qweight": torch.zeros(8, 16, dtype=torch.int32)}, [1])
    code, said, err = run("inspect", folder)
    assert code == 3 and "quantization_config is a list" in said and err.count("\n") == 1


def test_a_config_that_says_nothing(run, tmp_path):
    folder = foreign(tmp_path / "m", {"a.qweight": torch.zeros(8, 16, dtype=torch.int32)}, None)
    code, said, _ = run("inspect", folder)
    assert code == 0 and "look like GPTQ or AWQ" in said and "codes of a width that nothing here says" in said


def test_folders_of_qkit_and_files(run, packed, tiny, tmp_path, small):
    out = tmp_path / "job-of"
    code, _, err = run("quantize", "--model", tiny("llama"), "--scheme", "w4a16", "--out", out, "--keep-job")
    assert code == 0, err
    assert "job folder of qkit" in run("inspect", f"{out}.job")[1]
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "profile.json").write_text("{}")
    assert "profile folder of qkit" in run("inspect", tmp_path / "profile")[1]
    said = run("inspect", packed / "model.safetensors")[1]
    assert "safetensors file" in said and "the tensors look like compressed-tensors" in said
    (tmp_path / "empty").mkdir()
    assert run("inspect", tmp_path / "empty")[0] == 0
    code, _, err = run("inspect", tmp_path / "nothing")
    assert code == 3 and "there is no such file or folder" in err
    code, _, err = run("inspect", packed / "config.json")
    assert code == 3 and "a safetensors file or a GGUF file" in err


HEADER = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


def shard(header=HEADER, data=bytes(8), length=None):
    return struct.pack("<Q", len(header) if length is None else length) + header + data


DAMAGE = {
    "empty": b"",
    "seven bytes": bytes(7),
    "header length": shard(length=1 << 63),
    "header longer than the file": shard(length=10_000),
    "not JSON": shard(b"{" + b"x" * 50 + b"}"),
    "not UTF-8": shard(b'{"\xff":1}' + b" " * 40),
    "a list": shard(b"[1]" + b" " * 40),
    "deep": shard(b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "trailing byte": shard(data=bytes(9)),
    "one byte short": shard(data=bytes(7)),
    "shape": shard(HEADER.replace(b"[2]", b"[3]")),
    "overflow": shard(HEADER.replace(b"[2]", b"[2,9223372036854775808]")),
    "dtype": shard(HEADER.replace(b"F32", b"F99")),
    "twice": shard(HEADER[:-1] + b"," + HEADER[1:]),
    "name": shard(HEADER.replace(b'"a"', b'"../a"')),
    "control": shard(HEADER.replace(b'"a"', b'"a\\u0000\\u001b[31m"')),
    "rank": shard(HEADER.replace(b"[2]", b"[1,1,1,1,1,1,1,1,1,2]")),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_shards_that_are_damaged(what, run, tiny, tmp_path):
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    (folder / "model.safetensors").write_bytes(DAMAGE[what])
    for path in (folder, folder / "model.safetensors"):
        code, said, err = run("inspect", path)
        assert code == 3 and "model.safetensors" in err and err.count("\n") == 1 and "damaged" in err, err
        assert "damaged: " in said and "\x1b" not in said + err
    assert "llama" in run("inspect", folder)[1]  # the rest is said all the same


def change_json(name, value):
    return lambda folder: (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def replaced(folder, name="model.safetensors"):
    """The place of a file that is removed."""
    (folder / name).unlink()
    return folder / name


def change_index(**changes):
    def go(folder):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}} | changes
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return go


FOLDERS = {
    "config is a list": change_json("config.json", [1]),
    "config is not JSON": change_json("config.json", "{"),
    "config is deep": change_json("config.json", "[" * 100_000 + "]" * 100_000),
    "config says NaN": change_json("config.json", '{"a": NaN}'),
    "record is a list": change_json("qkit.json", [1]),
    "record is empty": change_json("qkit.json", ""),
    "mark is damaged": change_json("qkit-rejected.json", "x"),
    "single file beside an index": change_json("model.safetensors.index.json", {"weight_map": {}}),
    "index leads out": change_index(weight_map={"a": "../x.safetensors"}),
    "index names a missing shard": change_index(weight_map={"a": "model-00002-of-00002.safetensors"}),
    "index is wrong": change_index(),
    "index maps to numbers": change_index(weight_map={"a": 7}),
    "no weight_map": change_index(weight_map=None),
    "link out": lambda folder: replaced(folder).symlink_to("/etc/hostname"),
    "FIFO": lambda folder: os.mkfifo(replaced(folder)),
    "FIFO as config": lambda folder: os.mkfifo(replaced(folder, "config.json")),
    "folder as shard": lambda folder: replaced(folder).mkdir(),
}  # fmt: skip


@pytest.mark.parametrize("what", FOLDERS)
def test_folders_that_are_damaged(what, run, tiny, tmp_path):
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    FOLDERS[what](folder)
    code, said, err = run("inspect", folder)
    assert code == 3 and err.count("\n") == 1 and "damaged" in err, err
    assert "damaged: " in said


ODD = (None, 0, -1, 1 << 70, 1.5, True, "", "x", "\x00\x1b", [], [[]], {}, {"a": []}, [None], ["x"])


def test_configs_and_records_of_any_type(packed, tmp_path):
    """Every value of the three files is replaced by values of every type: found or named, and nothing else."""
    random.seed(0)
    folder = shutil.copytree(packed, tmp_path / "out")
    for name in ("config.json", "qkit.json"):
        sound = json.loads((folder / name).read_text())
        places = list(paths(sound))
        for place in random.sample(places, min(60, len(places))):
            for value in random.sample(ODD, 4):
                (folder / name).write_text(json.dumps(put(sound, place, value)))
                assert inspect(folder).kind == "model folder"
        (folder / name).write_text(json.dumps(sound))


def paths(node, at=()):
    """The places of all values in JSON."""
    yield at
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inner:
        yield from paths(value, (*at, key))


def put(node, place, value):
    """A copy with another value at that place."""
    if not place:
        return value
    copied = dict(node) if isinstance(node, dict) else list(node)
    copied[place[0]] = put(node[place[0]], place[1:], value)
    return copied


def test_in_a_second_without_torch(packed):
    code = "import sys; from qkit.commands import main\ntry: main(sys.argv[1:])\nexcept SystemExit as e: assert not e.code\n"
    code += "assert not {'torch', 'transformers'} & sys.modules.keys()"
    path = os.pathsep.join(map(str, (ROOT, ROOT / "calib_data", ROOT / "kernels")))
    found = subprocess.run(
        [sys.executable, "-c", code, "inspect", packed],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert found.returncode == 0 and "made by: qkit" in found.stdout, found.stderr
