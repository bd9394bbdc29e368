"""Model folders: what is refused, what is read, how an output takes its place."""

import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qkit.errors import BadCheckpoint, IOFailure, NumericFailure, Unsupported, UsageError
from qkit.files import output as output_module
from qkit.files.checkpoint import Checkpoint, check_config, check_tied, load_json
from qkit.files.output import check_output_dir, commit_dir
from qkit.files.safefile import save_tensors

INDEX = "model.safetensors.index.json"
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "vocab_size": 10,
    "tie_word_embeddings": False,
}


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(10, 8), "lm_head.weight": torch.randn(10, 8)}
    for layer in range(2):
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = torch.randn(12, 8).bfloat16()
        tensors[f"model.layers.{layer}.mlp.up_proj.bias"] = torch.randn(12)
    return tensors


def write_json(path: Path, data: object) -> None:
    path.write_text(data if isinstance(data, str) else json.dumps(data))


@pytest.fixture
def single(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    write_json(folder / "config.json", CONFIG)
    save_tensors(folder / "model.safetensors", weights())
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    folder.mkdir()
    write_json(folder / "config.json", CONFIG)
    weight_map = {}
    for number in range(2):
        name = f"model-0000{number + 1}-of-00002.safetensors"
        part = {n: t for i, (n, t) in enumerate(weights().items()) if i % 2 == number}
        save_tensors(folder / name, part)
        weight_map.update(dict.fromkeys(part, name))
    write_json(folder / INDEX, {"metadata": {"total_size": 1}, "weight_map": weight_map})
    return folder


def edit_map(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((folder / INDEX).read_text())
    change(data["weight_map"])
    write_json(folder / INDEX, data)


def refused(folder: Path, match: str, error: type[Exception] = BadCheckpoint, **options: Any) -> str:
    with pytest.raises(error, match=match) as caught:
        Checkpoint.open(folder, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


# Good folders


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_reads_what_was_written(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    checkpoint = Checkpoint.open(str(folder))
    assert checkpoint.config == CONFIG and checkpoint.dropped == () and checkpoint.warnings == ()
    assert len(checkpoint.shards) == (1 if kind == "single" else 2)
    expected = weights()
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(checkpoint.read_finite(name), tensor) for name, tensor in expected.items())
    assert checkpoint.nbytes == sum(t.numel() * t.itemsize for t in expected.values())
    check_config(checkpoint.config, checkpoint.tensors)
    with pytest.raises(BadCheckpoint, match="no tensor 'nope'"):
        checkpoint.read("nope")


def test_diffusers_names(single: Path) -> None:
    (single / "model.safetensors").rename(single / "diffusion_pytorch_model.safetensors")
    assert Checkpoint.open(single).shards[0].name == "diffusion_pytorch_model.safetensors"


def test_fingerprint(single: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(single, tmp_path / "copy"))
    one, two = Checkpoint.open(single), Checkpoint.open(copy)
    assert one.fingerprint() == two.fingerprint() != one.sha256()
    assert one.sha256() == two.sha256()
    write_json(copy / "config.json", {**CONFIG, "rope_theta": 5})
    assert Checkpoint.open(copy).fingerprint() != one.fingerprint()
    shutil.copy(single / "config.json", copy)
    save_tensors(copy / "model.safetensors", {n: t + 1 for n, t in weights().items()})  # equal header and size
    assert Checkpoint.open(copy).fingerprint() != one.fingerprint()


def test_the_full_hash_sees_one_value(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    prints = set()
    for value in (0, 1):
        tensor = torch.zeros(4_000_000, dtype=torch.int8)
        tensor[2_345_678] = value
        save_tensors(tmp_path / "model.safetensors", {"a": tensor})
        prints.add(Checkpoint.open(tmp_path).sha256())
    assert len(prints) == 2


def test_side_files(single: Path) -> None:
    wanted = ["chat_template.jinja", "generation_config.json", "merges.txt", "preprocessor_config.json"]
    wanted += ["special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    wanted = ["LICENSE", "README.md", *wanted]
    for name in [
        *wanted,
        "modeling_evil.py",
        "tokenizer.pkl",
        "training_args.bin",
        "tokenization_x.py",
        ".gitattributes",
    ]:
        (single / name).write_text("{}")
    assert list(Checkpoint.open(single).side_files) == wanted
    (single / "tokenizer.json").unlink()
    (single / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(BadCheckpoint, match="leads out"):
        _ = Checkpoint.open(single).side_files


# A7, A11, A12, A20: index and shards


def test_tensor_in_two_shards(sharded: Path) -> None:
    save_tensors(sharded / "model-00001-of-00002.safetensors", weights())
    message = refused(sharded, "is in both")
    assert "model-00001-of" in message and "model-00002-of" in message


def test_index_disagrees_with_shard(sharded: Path) -> None:
    other = {1: "model-00002-of-00002.safetensors", 2: "model-00001-of-00002.safetensors"}
    edit_map(sharded, lambda m: m.update({"lm_head.weight": other[1 if "00001" in m["lm_head.weight"] else 2]}))
    message = refused(sharded, "'lm_head.weight' is in .* but the index lists it in")
    assert "00001" in message and "00002" in message


def test_missing_and_extra_tensor(sharded: Path) -> None:
    whole = (sharded / INDEX).read_text()
    edit_map(sharded, lambda m: m.update(ghost=m["lm_head.weight"]))
    refused(sharded, "'ghost' is missing from model-0000")
    write_json(sharded / INDEX, whole)
    edit_map(sharded, lambda m: m.pop("lm_head.weight"))
    refused(sharded, "'lm_head.weight' of model-0000.* not in the index")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "not valid JSON"),
        ("[]", "no weight_map"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {"a": 1}}', r"weight_map\['a'\] is 1"),
        ('{"weight_map": {"a": "x.bin"}}', r"weight_map\['a'\] is 'x.bin'"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' occurs twice"),
    ],
)
def test_bad_index(sharded: Path, content: str, match: str) -> None:
    write_json(sharded / INDEX, content)
    assert INDEX in refused(sharded, match)


def test_missing_shard_is_named_with_its_tensor(sharded: Path) -> None:
    edit_map(sharded, lambda m: m.update(ghost="model-00003-of-00003.safetensors"))
    assert "'ghost'" in refused(sharded, "model-00003-of-00003.safetensors: no such file")


def test_two_sets_of_weights(sharded: Path) -> None:
    save_tensors(sharded / "model.safetensors", weights())
    refused(sharded, "ambiguous")


def test_shards_beside_a_single_file_or_unlisted(single: Path, sharded: Path) -> None:
    for folder in (single, sharded):
        save_tensors(folder / "model-00001-of-00009.safetensors", weights())
        refused(folder, "ambiguous: 'model-00001-of-00009.safetensors'")


def test_shards_without_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    refused(sharded, "no model.safetensors.index.json")


# A8, A10: containment


@pytest.mark.parametrize("where", ["../x", "/tmp/x", "a/../../x", "..\\x", "C:\\x", "./x", "a//x", "x\0", "x\n", ""])
def test_index_names_that_lead_out(sharded: Path, where: str) -> None:
    save_tensors(sharded.parent / "x.safetensors", {"ghost": torch.zeros(1)})
    edit_map(sharded, lambda m: m.update(ghost=f"{where}.safetensors" if where else ""))
    refused(sharded, "names the file|expected a safetensors")


@pytest.mark.parametrize("link", ["file", "parent"])
def test_links_that_lead_out(sharded: Path, link: str) -> None:
    outside = sharded.parent / "outside"
    outside.mkdir()
    save_tensors(outside / "x.safetensors", {"ghost": torch.zeros(1)})
    if link == "file":
        (sharded / "x.safetensors").symlink_to(outside / "x.safetensors")
    else:
        (sharded / "sub").symlink_to(outside)
    edit_map(sharded, lambda m: m.update(ghost="x.safetensors" if link == "file" else "sub/x.safetensors"))
    refused(sharded, "leads out of the model folder")


def test_links_that_stay_inside_and_loops(sharded: Path) -> None:
    (sharded / "sub").mkdir()
    save_tensors(sharded / "sub" / "x.safetensors", {"ghost": torch.zeros(1)})
    (sharded / "y.safetensors").symlink_to("sub/x.safetensors")
    edit_map(sharded, lambda m: m.update(ghost="y.safetensors"))
    assert Checkpoint.open(sharded).read("ghost").item() == 0
    (sharded / "y.safetensors").unlink()
    (sharded / "y.safetensors").symlink_to("y.safetensors")
    refused(sharded, "y.safetensors: no such file")


def test_config_that_leads_out(single: Path) -> None:
    (single / "config.json").rename(single.parent / "config.json")
    (single / "config.json").symlink_to("../config.json")
    refused(single, "config.json: leads out")


@pytest.mark.parametrize("inside", [True, False])
def test_hugging_face_cache(single: Path, tmp_path: Path, inside: bool) -> None:
    repo = tmp_path / "models--a--b"
    snapshot, store = repo / "snapshots" / "123abc", repo / "blobs" if inside else tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    store.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.move(single / name, store / f"hash-{name}")
        (snapshot / name).symlink_to(os.path.relpath(store / f"hash-{name}", snapshot))
    if inside:
        checkpoint = Checkpoint.open(snapshot)
        assert torch.equal(checkpoint.read("lm_head.weight"), weights()["lm_head.weight"])
        assert checkpoint.shards[0].name == "model.safetensors"
    else:
        refused(snapshot, "leads out")


def test_hard_link_is_a_warning(single: Path, tmp_path: Path) -> None:
    os.link(single / "model.safetensors", tmp_path / "other")
    assert "hard link" in Checkpoint.open(single).warnings[0]


# Folders that are no models; A16, A19


def test_no_folder_no_config_no_weights(single: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such folder")
    refused(single / "config.json", "no such folder")
    refused(tmp_path, "no weights")
    (single / "config.json").unlink()
    refused(single, "config.json: no such file")


def test_pickles_are_refused_and_never_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    write_json(tmp_path / "config.json", CONFIG)
    kinds = {"pytorch_model.bin": b"", "model.pt": b"\x80\x04broken", "model.ckpt": b"7z\xbc\xaf\x27\x1c", "w.pth": b""}
    for name, broken in kinds.items():
        (tmp_path / name).write_bytes(broken or pickle.dumps(Payload()))
        refused(tmp_path, f"{name}.*convert to safetensors")
        (tmp_path / name).unlink()
    with tarfile.open(tmp_path / "legacy.tar", "w") as tar:
        tar.add(tmp_path / "config.json", "config.json")
    refused(tmp_path, "legacy.tar.*convert to safetensors")
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Payload()))
    refused(tmp_path, "header")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"text_config": {"quantization_config": {"quant_method": "bitsandbytes"}}},
        {"compression_config": {"quant_method": "bitsandbytes"}},
    ],
)
def test_quantized_input_is_named(single: Path, config: dict[str, Any]) -> None:
    write_json(single / "config.json", {**CONFIG, **config})
    assert "dequantize" in refused(single, "bitsandbytes", Unsupported)
    assert Checkpoint.open(single, quantized=True).config == {**CONFIG, **config}


def test_null_quantization_config_is_none(single: Path) -> None:
    write_json(single / "config.json", {**CONFIG, "quantization_config": None})
    Checkpoint.open(single)


@pytest.mark.parametrize(
    ("name", "words", "error"),
    [("quantize_config.json", "bits is None", Unsupported), ("hf_quant_config.json", "modelopt", BadCheckpoint)],
)
def test_quantized_by_a_file_beside(single: Path, name: str, words: str, error: type[Exception]) -> None:
    write_json(single / name, {})
    refused(single, words, error)
    Checkpoint.open(single, quantized=True)


@pytest.mark.parametrize("suffix", ["qweight", "weight_packed", "weight_scale_inv", "SCB"])
def test_quantized_by_its_tensors(single: Path, suffix: str) -> None:
    save_tensors(single / "model.safetensors", {**weights(), f"model.layers.0.mlp.up_proj.{suffix}": torch.zeros(1)})
    refused(single, suffix, BadCheckpoint if suffix == "weight_scale_inv" else Unsupported)
    Checkpoint.open(single, quantized=True)


@pytest.mark.parametrize("quantized", [False, True])
def test_gguf(tmp_path: Path, quantized: bool) -> None:
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    refused(tmp_path, "GGUF", Unsupported, quantized=quantized)


# B1, B2, B6: the config


def test_keys_that_choose_code_are_dropped(single: Path) -> None:
    nested = {"auto_map": {"AutoModel": "x--y.Z"}, "hidden_size": 8, "_attn_implementation_internal": "a/b"}
    evil = {
        "trust_remote_code": True,
        "auto_map": {"AutoConfig": "configuration_x.X"},
        "_attn_implementation": "evil/kernels",
        "attn_implementation": "evil/kernels",
        "_experts_implementation": "evil/kernels",
        "use_kernels": True,
        "kernel_config": {"a": 1},
        "vision_config": nested,
        "towers": [nested],
        "kernel_size": 3,
    }
    write_json(single / "config.json", {**CONFIG, **evil})
    checkpoint = Checkpoint.open(single)
    clean = {"hidden_size": 8}
    assert checkpoint.config == {**CONFIG, "vision_config": clean, "towers": [clean], "kernel_size": 3}
    assert set(checkpoint.dropped) == {
        *("trust_remote_code", "auto_map", "_attn_implementation", "attn_implementation", "_experts_implementation"),
        *("use_kernels", "kernel_config", "vision_config.auto_map", "vision_config._attn_implementation_internal"),
        *("towers.0.auto_map", "towers.0._attn_implementation_internal"),
    }


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ('{"a": NaN}', "finite"),
        ('{"a": -Infinity}', "finite"),
        ('{"a": 1e999}', "finite"),
        ('{"a": ' + "[" * 64 + "]" * 64 + "}", "64 levels"),
        ("[" * 100_000, "too deep"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"a": "' + "x" * 2000 + '"}', "at most 2000"),
        ("", "not valid JSON"),
    ],
)
def test_strict_json(tmp_path: Path, content: str, match: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(BadCheckpoint, match=match) as caught:
        load_json(path, "some file", 2000 if match.startswith("at most") else 1 << 20)
    assert "file.json" in str(caught.value)


def test_nesting_up_to_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("[" * 64 + "1" + "]" * 64)
    assert isinstance(load_json(path, "some file"), list)


def test_config_must_be_an_object(single: Path) -> None:
    write_json(single / "config.json", "[1]")
    refused(single, "config.json: found a list")


# A13: sizes


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 3),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 0),
        ("num_attention_heads", None),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 0),
        ("hidden_size", "8"),
        ("hidden_size", True),
        ("hidden_size", 8.0),
        ("head_dim", -2),
        ("head_dim", 0),
        ("intermediate_size", []),
        ("vocab_size", 2**40),
        ("n_layer", 0),
        ("ffn_dim", "x"),
        ("word_embed_proj_dim", 0),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_sizes_of_the_config(single: Path, field: str, value: object, nested: bool) -> None:
    tensors = Checkpoint.open(single).tensors
    config = {**CONFIG, field: value}
    with pytest.raises(BadCheckpoint, match=f"{field} is .*, expected"):
        check_config({"text_config": config, "hidden_size": "x"} if nested else config, tensors)


def test_sizes_that_are_fine(single: Path) -> None:
    tensors = Checkpoint.open(single).tensors
    for change in (
        {"head_dim": None, "num_key_value_heads": None},
        {"intermediate_size": [12, 12]},
        {"num_hidden_layers": 1, "num_nextn_predict_layers": 1},
        {"hidden_size": 16, "word_embed_proj_dim": 8},
        {"head_dim": 0, "qk_rope_head_dim": 0, "qk_nope_head_dim": 2},
    ):
        check_config({**CONFIG, **change}, tensors)
    check_config({}, tensors)
    check_config({"vision_config": {"hidden_size": 0}}, {})


def test_layer_without_tensors(tmp_path: Path) -> None:
    save_tensors(tmp_path / "model.safetensors", {f"h.{i}.w": torch.zeros(1) for i in (0, 2)})
    write_json(tmp_path / "config.json", {"n_layer": 3})
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(BadCheckpoint, match=r"'h\.1' has no tensors"):
        check_config(checkpoint.config, checkpoint.tensors)


def test_vision_tower_has_its_own_count(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.w" for i in range(2)] + [f"visual.blocks.{i}.layers.7.w" for i in range(5)]
    save_tensors(tmp_path / "model.safetensors", {name: torch.zeros(1) for name in names})
    write_json(tmp_path / "config.json", {"text_config": {"num_hidden_layers": 2}})
    checkpoint = Checkpoint.open(tmp_path)
    check_config(checkpoint.config, checkpoint.tensors)
    with pytest.raises(BadCheckpoint, match=r"num_hidden_layers is 8, expected .*2 in 'model.layers', 5 in"):
        check_config({"text_config": {"num_hidden_layers": 8}}, checkpoint.tensors)


# A14, A17, A18: values


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_values(single: Path, name: str, value: float) -> None:
    tensors = weights()
    tensors[name].view(-1)[3] = value
    save_tensors(single / "model.safetensors", tensors)
    checkpoint = Checkpoint.open(single)
    with pytest.raises(NumericFailure, match=f"{name}.*: 1 of {tensors[name].numel()} values"):
        checkpoint.read_finite(name)
    assert checkpoint.read_finite(name, allow=True).shape == tensors[name].shape
    checkpoint.read_finite("lm_head.weight")


def test_file_that_changes_after_open(single: Path) -> None:
    file = single / "model.safetensors"
    content = file.read_bytes()

    def rewritten() -> None:
        with file.open("r+b") as handle:
            handle.seek(-1, os.SEEK_END)
            handle.write(b"x")
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1000))

    def replaced() -> None:
        state = file.stat()
        (single / "new").write_bytes(content)
        os.replace(single / "new", file)
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))

    for change in (lambda: os.truncate(file, 100), rewritten, replaced, file.unlink):
        checkpoint = Checkpoint.open(single)
        checkpoint.read("lm_head.weight")
        change()
        for use in (lambda c=checkpoint: c.read("lm_head.weight"), checkpoint.fingerprint):
            with pytest.raises(BadCheckpoint, match="changed while reading"):
                use()
        file.write_bytes(content)


def test_tied_embeddings(single: Path) -> None:
    def with_head(head: torch.Tensor | None) -> Checkpoint:
        tensors = weights()
        del tensors["lm_head.weight"]
        save_tensors(single / "model.safetensors", tensors if head is None else {**tensors, "lm_head.weight": head})
        return Checkpoint.open(single)

    embedding = weights()["model.embed_tokens.weight"]
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    check_tied(with_head(embedding), tied)
    check_tied(with_head(embedding + 1), {})
    check_tied(with_head(None), tied)
    for head in (embedding + 1, embedding.bfloat16(), embedding[:5]):
        with pytest.raises(
            BadCheckpoint, match=r"ties 'model.embed_tokens.weight' and 'lm_head.weight', and they differ"
        ):
            check_tied(with_head(head), tied)


# D13, D14: output


def test_output_dir(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = tmp_path / "full"
    full.mkdir()
    check_output_dir(tmp_path / "new", single, False)
    check_output_dir(full, single, False)
    (full / "x").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(full)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "alias").symlink_to(single)
    with pytest.raises(UsageError, match="--overwrite"):
        check_output_dir(full, single, False)
    with pytest.raises(UsageError, match=r"there is no qkit\.json in it"):
        check_output_dir(full, single, True)
    check_output_dir(full, single, True, replace=False)
    (full / "qkit.json").write_text("{}")
    with pytest.raises(UsageError, match=r"'x' is not on the list"):
        check_output_dir(full, single, True)
    record(full)
    check_output_dir(full, single, True)
    never = [single, single / "out", single / ".." / "model", tmp_path, tmp_path / "alias" / "sub"]
    never += [tmp_path / "link", tmp_path / "dangling", tmp_path / "alias", tmp_path / "file"]
    for out in never:
        for overwrite in (False, True):
            with pytest.raises(UsageError):
                check_output_dir(out, single, overwrite)
    monkeypatch.chdir(full)
    with pytest.raises(UsageError, match="working directory"):
        check_output_dir(full, single, True)


def record(folder: Path) -> None:
    """Have the folder say that qkit wrote all that is in it."""
    (folder / "qkit.json").write_text(json.dumps({"files": dict.fromkeys(content(folder), "0" * 64)}))


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    folder = tmp_path / "out.partial"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "b").write_text("new")
    (folder / "a").write_text("new")
    return folder


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("there", ["nothing", "empty", "full"])
def test_commit(partial: Path, tmp_path: Path, there: str) -> None:
    out = tmp_path / "out"
    if there != "nothing":
        out.mkdir()
    if there == "full":
        (out / "old").write_text("old")
        with pytest.raises(UsageError, match="--overwrite"):
            commit_dir(partial, out, False)
        with pytest.raises(UsageError, match="--overwrite"):
            commit_dir(partial, out, True)
        assert content(out) == {"old": "old"} and partial.exists()
        record(out)
    commit_dir(partial, out, there == "full")
    assert content(out) == {"a": "new", "sub/b": "new"}
    assert os.listdir(tmp_path) == ["out"]


def test_commit_refuses_links_files_and_other_parents(partial: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(partial)
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "link", tmp_path / "file", tmp_path / "elsewhere" / "out"):
        with pytest.raises(UsageError):
            commit_dir(partial, out, True)
    assert content(partial) == {"a": "new", "sub/b": "new"}


@pytest.mark.parametrize("call", ["rename", "fsync"])
def test_commit_at_every_failure_shows_the_old_or_the_new(
    partial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    out, new = tmp_path / "out", {"a": "new", "sub/b": "new"}
    real = getattr(os, call)
    for nth in range(20):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (out / "old").write_text("old")
        record(out)
        old = content(out)
        saved = Path(shutil.copytree(partial, tmp_path / "saved"))
        calls = 0

        def failing(*args: object, nth: int = nth) -> object:
            nonlocal calls
            calls += 1
            if calls == nth + 1:
                raise OSError(5, "Input/output error")
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(output_module.os, call, failing)
            try:
                commit_dir(partial, out, True)
                assert content(out) == new
                break
            except IOFailure as error:
                assert "Input/output error" in str(error)
        assert content(out) in (old, new)
        assert content(out) == new or content(partial) == new
        shutil.rmtree(partial, ignore_errors=True)
        saved.rename(partial)
        for leftover in tmp_path.glob(".qkit-old-*"):
            assert content(out) == new and content(leftover) == old
            shutil.rmtree(leftover)
    assert nth >= 2
