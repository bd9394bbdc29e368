"""qkit convert: the numbers of a quantized model in another layout, or the layer and the reason why not."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantized_sources as made
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import qkit
from qkit.errors import QkitError, Unsupported, UsageError, VerifyFailure
from qkit.files.checkpoint import Checkpoint
from qkit.files.sources.packed import open_packed
from qkit.nn.layers import QuantLinear
from qkit.system.progress import Silent
from qkit.tensor.qtensor import dequantize
from qkit.workflows.convert import EXPORTS, convert

INT = {"type": "int", "strategy": "group", "group_size": 32}
NVFP4 = {
    "type": "float",
    "num_bits": 4,
    "strategy": "tensor_group",
    "group_size": 16,
    "symmetric": True,
    "scale_dtype": torch.float8_e4m3fn,
}
FP8 = {"type": "float", "num_bits": 8, "symmetric": True}
Q = "model.layers.0.self_attn.q_proj"
Maker = Callable[[Path, Path], tuple[Path, Path]]
SOURCES: dict[str, Maker] = {
    "gptq": lambda plain, out: made.gptq(plain, out),
    "gptq v2": lambda plain, out: made.gptq(plain, out, version="gptq_v2", shards=3),
    "gptq sym": lambda plain, out: made.gptq(plain, out, sym=True),
    "gptq with 3 bits": lambda plain, out: made.gptq(plain, out, 3),
    "awq": lambda plain, out: made.awq(plain, out),
    "int4": lambda plain, out: made.compressed(plain, out, {**INT, "num_bits": 4, "symmetric": True}, "pack-quantized"),
    "int8": lambda plain, out: made.compressed(plain, out, {**INT, "num_bits": 8, "symmetric": True}, "pack-quantized"),
    "nvfp4": lambda plain, out: made.compressed(plain, out, NVFP4, "nvfp4-pack-quantized"),
    "fp8": lambda plain, out: made.fp8(plain, out, None),  # its scale is a float32 number that 16 bits do not hold
}
TARGETS = {
    "gptq": ("gptq", "awq", "mlx", "compressed-tensors"),
    "gptq v2": ("gptq", "awq", "mlx", "compressed-tensors"),
    "gptq sym": ("gptq", "awq", "mlx", "compressed-tensors"),
    "gptq with 3 bits": ("gptq", "mlx", "compressed-tensors"),
    "awq": ("gptq", "awq", "mlx", "compressed-tensors"),
    "int4": ("gptq", "awq", "mlx", "compressed-tensors"),
    "int8": ("gptq", "mlx", "compressed-tensors"),
    "nvfp4": ("modelopt", "compressed-tensors"),
    "fp8": ("compressed-tensors",),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("llama", tmp_path_factory.mktemp("plain") / "model", torch.float16)


@pytest.fixture(scope="module")
def sources(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = SOURCES[kind](plain, tmp_path_factory.mktemp("source"))[0]
        return folders[kind]

    return get


def weights(folder: Path) -> dict[str, torch.Tensor]:
    packed = open_packed(folder)
    return {name: dequantize(linear.read(packed.checkpoint)[0]) for name, linear in packed.linears.items()}


def quantized(plain: Path, out: Path, **options: Any) -> Path:
    qkit.quantize(plain, out=out, **options)
    return out


@pytest.mark.parametrize(("kind", "export"), [(k, e) for k, exports in TARGETS.items() for e in exports])
def test_weights_are_those_of_the_source(
    kind: str, export: str, sources: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = convert(str(sources(kind)), export, out, Silent())
    assert done.report.ok and done.equal == done.linears > 0 and done.difference == 0
    before, after = weights(sources(kind)), weights(out)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    first, second = Checkpoint.open(sources(kind)), Checkpoint.open(out)
    for name in first.tensors.keys() - {f"{n}.weight" for n in before}:
        assert torch.equal(first.read(name), second.read(name))
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == export
    assert qkit.verify(out).ok and not list(tmp_path.glob("out.*"))


@pytest.mark.parametrize(("kind", "export"), [(k, e) for k in TARGETS for e in EXPORTS if e not in TARGETS[k]])
def test_other_grids_are_refused_with_what_works(
    kind: str, export: str, sources: Callable[[str], Path], tmp_path: Path, run
) -> None:
    with pytest.raises(Unsupported, match=rf"--export {export}: model\.layers\.0\.\S+_proj: ") as refused:
        convert(str(sources(kind)), export, tmp_path / "out", Silent())
    assert list(tmp_path.iterdir()) == []
    fits = re.search(r"As it is, the model fits --export ([a-z -]+);", str(refused.value))
    assert fits is not None and set(fits[1].split(" and ")) == set(TARGETS[kind])
    proved_command(str(refused.value), tmp_path / "anew", run, export)


def proved_command(message: str, out: Path, run, export: str) -> None:
    """The command at the end of a message does what it says."""
    words = shlex.split("qkit quantize" + message.partition("qkit quantize")[2])
    assert words[-2:] == ["--out", "OUT"]
    code, _, err = run(*words[1:-1], out)
    assert code == 0, err
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == export and qkit.verify(out).ok


def test_symmetric_awq_becomes_symmetric(plain: Path, tmp_path: Path) -> None:
    first = quantized(plain, tmp_path / "a", scheme="w4a16", group_size=32, export="awq")
    convert(str(first), "gptq", tmp_path / "b", Silent())
    config = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert config["sym"] is True and config["checkpoint_format"] == "gptq"
    assert config == json.loads((tmp_path / "b" / "quantize_config.json").read_text())


@pytest.mark.parametrize(
    ("scheme", "export"),
    [("w4a16", "gptq"), ("w4a16_asym", "gptq"), ("w8a16", "gptq"), ("w4a16", "awq"), ("fp8", "modelopt"),
     ("fp8_dynamic", "modelopt"), ("nvfp4", "modelopt"), ("nvfp4a16", "modelopt"), ("mxfp8", "modelopt"), ("w5a16", "mlx"),
     ("w4a16_asym", "mlx"), ("mxfp4a16", "mlx"), ("mxfp8a16", "mlx")],
)  # fmt: skip
def test_straight_from_the_quantizer(scheme: str, export: str, plain: Path, tmp_path: Path) -> None:
    size = {"group_size": 32} if scheme.startswith("w") else {}
    rows = {"samples": 2, "seqlen": 16} if scheme in ("fp8", "nvfp4") else {}
    out = quantized(plain, tmp_path / "out", scheme=scheme, export=export, **size, **rows)
    other = quantized(plain, tmp_path / "other", scheme=scheme, **size, **rows)
    record, usual = (json.loads((f / "qkit.json").read_text()) for f in (out, other))
    assert record["linears"].keys() == usual["linears"].keys()
    if export != "modelopt":  # there the global scale is one that has a reciprocal
        same = [
            record["linears"][n]["weight_sha256"] == usual["linears"][n]["weight_sha256"] for n in record["linears"]
        ]
        assert all(same)
    back = tmp_path / "back"
    done = convert(str(out), "compressed-tensors", back, Silent())
    assert done.equal == done.linears
    model, again = qkit.load(out, dtype=torch.float32), qkit.load(back, dtype=torch.float32)
    assert isinstance(model.get_submodule(Q), QuantLinear)
    tokens = torch.arange(1, 17)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)


def test_mixed_bits_and_groups_become_rules_of_gptq(plain: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "scheme: W4A16\ngroup_size: 32\nrules:\n  - match: '*.self_attn.*'\n    scheme: W8A16\n    group_size: 64\n"
        "  - match: '*.layers.1.mlp.down_proj'\n    skip: kept in 16 bits\n"
    )
    first = quantized(plain, tmp_path / "a", recipe=rules)
    done = convert(str(first), "gptq", tmp_path / "b", Silent())
    config = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    kinds = [config, *config["dynamic"].values()]
    assert {(kind["bits"], kind["group_size"]) for kind in kinds if kind} == {(4, 32), (8, 64)} and {} in kinds
    before, after = weights(first), weights(tmp_path / "b")
    assert done.equal == len(before) and all(torch.equal(before[n], after[n]) for n in before)
    assert "model.layers.1.mlp.down_proj" not in after
    with pytest.raises(Unsupported, match=r"it has 8 bits, and AWQ has 4"):
        convert(str(first), "awq", tmp_path / "c", Silent())


def test_scales_of_a_cache_go_along_or_the_layout_is_refused(plain: Path, tmp_path: Path) -> None:
    first = quantized(plain, tmp_path / "a", scheme="fp8", kv="fp8", samples=2, seqlen=16)
    convert(str(first), "modelopt", tmp_path / "b", Silent())
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    before = load_file(first / "model.safetensors")
    attention = Q.removesuffix(".q_proj")
    assert torch.equal(tensors[f"{attention}.k_proj.k_scale"].float(), before[f"{attention}.k_scale"].float())
    assert (
        json.loads((tmp_path / "b" / "hf_quant_config.json").read_text())["quantization"]["kv_cache_quant_algo"]
        == "FP8"
    )
    assert len(qkit.load(tmp_path / "b").get_submodule(attention).k_scale) == 1
    four = quantized(plain, tmp_path / "c", scheme="w4a16", group_size=32, kv="fp8", samples=2, seqlen=16)
    with pytest.raises(Unsupported, match=r"k_scale: GPTQ has no place for the scales of an FP8 KV cache"):
        convert(str(four), "gptq", tmp_path / "d", Silent())


def test_what_cannot_be_converted_says_so(plain: Path, sources: Callable[[str], Path], tmp_path: Path, run) -> None:
    with pytest.raises(UsageError, match="the model is not quantized, so there is nothing to convert") as refused:
        convert(str(plain), "gptq", tmp_path / "out", Silent())
    proved_command(str(refused.value), tmp_path / "quantized", run, "compressed-tensors")
    ordered, _ = made.gptq(plain, tmp_path / "ordered", act_order=True)
    with pytest.raises(
        Unsupported, match=r"_proj: it cannot be converted as it is stored \(GPTQ with 4 bits\): .*g_idx"
    ) as refused:
        convert(str(ordered), "awq", tmp_path / "out", Silent())
    proved_command(str(refused.value), tmp_path / "anew", run, "compressed-tensors")
    filled = tmp_path / "filled"
    filled.mkdir()
    (filled / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="the output folder is not empty"):
        convert(str(sources("int4")), "gptq", filled, Silent())
    assert (filled / "mine.txt").read_text() == "keep"


def test_scales_of_32_bits_that_16_do_not_hold(sources: Callable[[str], Path], tmp_path: Path) -> None:
    source = copy_of(sources("int4"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors = {n: t.float() * (1 + 2**-20) if n.endswith("_scale") else t for n, t in tensors.items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        Unsupported,
        match=r"--export gptq: model\.layers\.0\.\S+: \d+ of its \d+ scales are float32 numbers that float16",
    ):
        convert(str(source), "gptq", tmp_path / "out", Silent())
    with pytest.raises(
        Unsupported,
        match=r"fits --export mlx and compressed-tensors; quantized anew, better from its original, it fits awq: ",
    ):
        convert(str(source), "awq", tmp_path / "out", Silent())


@pytest.mark.parametrize(
    ("kind", "leaf", "value", "export", "words"),
    [
        ("gptq sym", "scales", 0.0, "compressed-tensors", "scales of its weights are 0, and qkit stores only"),
        ("gptq", "scales", -0.5, "awq", "scales of its weights are 0 or less"),
        ("gptq", "scales", float("inf"), "gptq", "scales of its weights are NaN or infinite"),
        ("nvfp4", "weight_scale", 0.0, "modelopt", "scales of its weights are 0 or less"),
        ("nvfp4", "weight_global_scale", float("nan"), "compressed-tensors", "global scale are NaN or infinite"),
        ("nvfp4", "weight_global_scale", 1e-44, "modelopt", "some of its weights are NaN or infinite"),
    ],
)
def test_scales_that_no_result_has_are_found_before_anything_is_written(
    kind: str, leaf: str, value: float, export: str, words: str, sources: Callable[[str], Path], tmp_path: Path, run
) -> None:
    source = copy_of(sources(kind), tmp_path / "source")
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [n for n in tensors if n == f"model.layers.1.mlp.up_proj.{leaf}"]:
            tensors[name].view(-1)[0] = value
        save_file(tensors, file, {"format": "pt"})
    code, _, err = run("convert", source, "--export", export, "--out", tmp_path / "out")
    assert code == 3 and "model.layers.1.mlp.up_proj" in err and words in err and len(err.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    if "qkit quantize" in err:
        proved_command(err.strip(), tmp_path / "anew", run, export)


def test_a_damaged_result_is_not_converted(plain: Path, tmp_path: Path) -> None:
    first = quantized(plain, tmp_path / "a", scheme="w4a16", group_size=32)
    tensors = load_file(first / "model.safetensors")
    tensors[f"{Q}.weight_packed"][0, 0] ^= 1
    save_file(tensors, first / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerifyFailure, match=rf"{re.escape(Q)}: its weights are not those that qkit.json says"):
        convert(str(first), "gptq", tmp_path / "b", Silent())


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


DAMAGES: list[tuple[str, str, Callable[[Path], None], str]] = [
    ("w4a16", "gptq", lambda f: flip(f, f"{Q}.qweight"), "the decoded weight is not the one that was intended"),
    ("w4a16", "gptq", lambda f: flip(f, f"{Q}.qzeros"), "zero points of a symmetric weight are not 0"),
    ("w4a16", "gptq", lambda f: flip(f, f"{Q}.g_idx"), "groups do not follow each other"),
    ("w4a16", "gptq", lambda f: say(f, "bits", 8), "says int8 group 32"),
    ("w4a16", "gptq", lambda f: say(f, "group_size", 64), "says int4 group 64"),
    ("w4a16", "gptq", lambda f: say(f, "sym", "yes"), "quantization_config.sym: found"),
    ("w4a16", "gptq", lambda f: say(f, "desc_act", True), "desc_act: found true, expected false"),
    ("w4a16", "gptq", lambda f: say(f, "lm_head", True), "lm_head: is not quantized, and the config says that it is"),
    (
        "w4a16",
        "gptq",
        lambda f: say(f, "dynamic", {r"-:.*q_proj": {}}),
        "is quantized, and the config says that it is not",
    ),
    ("w4a16", "gptq", lambda f: say(f, "checkpoint_format", "gptq_v2"), "checkpoint_format: found"),
    ("w4a16", "gptq", lambda f: (f / "quantize_config.json").write_text("{}"), "quantize_config.json: differs"),
    ("w4a16", "awq", lambda f: flip(f, f"{Q}.qweight"), "the decoded weight is not the one that was intended"),
    ("w4a16", "awq", lambda f: say(f, "modules_to_not_convert", ["q_proj"]), "the config says that it is not"),
    ("w4a16", "awq", lambda f: say(f, "zero_point", False), "zero_point: found false, expected true"),
    ("nvfp4a16", "modelopt", lambda f: scale(f, f"{Q}.weight_scale_2"), "the decoded weight is not the one"),
    ("nvfp4a16", "modelopt", lambda f: say(f, "quant_algo", "NVFP4"), "says nvfp4 dynamic of its inputs"),
    ("nvfp4a16", "modelopt", lambda f: say(f, "ignore", []), "lm_head: is not quantized"),
    ("w4a16", "mlx", lambda f: flip(f, f"{Q}.weight"), "the decoded weight is not the one that was intended"),
    ("w4a16", "mlx", lambda f: scale(f, f"{Q}.scales"), "are no zero point from 0 to 15 times the scale"),
    ("w4a16", "mlx", lambda f: scale(f, f"{Q}.biases", 0.5), "zero points of a symmetric weight are not 0"),
    ("w4a16", "mlx", lambda f: say(f, "bits", 8), "says int8 group 32"),
    ("w4a16", "mlx", lambda f: say(f, "mode", "mxfp4"), "says mxfp4"),
    ("w4a16", "mlx", lambda f: say(f, Q, False), "is quantized, and the config says that it is not"),
    ("w4a16", "mlx", lambda f: say(f, "lm_head", None), "lm_head: found null"),
    ("w4a16", "mlx", lambda f: say(f, "group_size", 64), "config.json: quantization: found"),
    ("mxfp4a16", "mlx", lambda f: flip(f, f"{Q}.scales"), "the decoded weight is not the one"),
]


def flip(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(torch.uint8).view(-1)[0] ^= 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def scale(folder: Path, name: str, factor: float | None = None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].reciprocal() if factor is None else tensors[name] * factor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def say(folder: Path, key: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def results(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    folders: dict[tuple[str, str], Path] = {}

    def get(scheme: str, export: str) -> Path:
        if (scheme, export) not in folders:
            size = {"group_size": 32} if scheme == "w4a16" else {}
            out = tmp_path_factory.mktemp("result") / "out"
            folders[scheme, export] = quantized(plain, out, scheme=scheme, export=export, **size)
        return folders[scheme, export]

    return get


@pytest.mark.parametrize(("scheme", "export", "damage", "fault"), DAMAGES)
def test_verify_notices(
    scheme: str,
    export: str,
    damage: Callable[[Path], None],
    fault: str,
    results: Callable[[str, str], Path],
    tmp_path: Path,
) -> None:
    folder = copy_of(results(scheme, export), tmp_path / "out")
    assert qkit.verify(folder).ok
    damage(folder)
    problems = [str(p) for p in qkit.verify(folder).problems]
    assert any(fault in p for p in problems), problems


def test_plans_say_what_has_no_place(plain: Path, tmp_path: Path) -> None:
    for scheme, export, reason in (("w8a8", "gptq", "its inputs are quantized"), ("w8a16", "awq", "it has 8 bits")):
        with pytest.raises(QkitError, match=rf"--export {export}: model\.layers\.0\S+: {reason}"):
            qkit.quantize(plain, out=tmp_path / "out", scheme=scheme, export=export)
    assert not (tmp_path / "out").exists()


def test_the_command(run, plain: Path, tmp_path: Path) -> None:
    first = quantized(plain, tmp_path / "a", scheme="w4a16", group_size=32)
    report = tmp_path / "report.json"
    code, out, err = run("convert", first, "--export", "gptq", "--out", tmp_path / "b", "--json", report)
    assert code == 0, err
    data = json.loads(report.read_text())
    assert (
        data["equal"] == data["linears"]
        and f"{data['equal']} of {data['linears']} weights are those of the source" in out
    )
    code, out, err = run("convert", first, "--export", "modelopt", "--out", tmp_path / "c")
    assert code != 0 and "ModelOpt has no name for int4, group 32" in err and "Traceback" not in err
