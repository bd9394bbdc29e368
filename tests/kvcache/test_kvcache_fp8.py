"""FP8 KV caches: scales measured on the quantized model, what stands in the checkpoint, and the same cache in qkit."""

import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import Quiet
from decompressed import reference_model
from packed_samples import sha
from runs import contents, killed_after
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

import qkit
from qkit.errors import BadCheckpoint, Unsupported
from qkit.evaluation.decoding import decode_windows
from qkit.kvcache.cache import PackedCache, make_cache
from qkit.kvcache.policy import parse
from qkit.kvcache.scales import RangeCache, tensor_names
from qkit.kvcache.shape import CacheShape
from qkit.kvcache.store import Float8
from qkit.verification.verify import verify
from qkit.workflows.calibration_rows import text_rows
from qkit.workflows.quantize import Request, open_structure, prepare, quantize

FP8 = parse("fp8").to_json()
GRID = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
GRID = GRID[GRID.isfinite()]


@pytest.fixture(scope="module")
def request_(tiny, calib):
    """Grouped queries, biases of q, k and v."""
    model = str(tiny("qwen2", torch.float32, num_hidden_layers=3))
    return Request(
        model=model, scheme="w4a16", method="rtn", group_size=32, calib=calib, samples=6, seqlen=32, threads=1, kv=FP8
    )


@pytest.fixture(scope="module")
def out(request_, tmp_path_factory):
    """A checkpoint with scales; not to be written to."""
    folder = tmp_path_factory.mktemp("fp8") / "out"
    assert quantize(request_, folder, Quiet()).ok
    return folder


def tensors_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def measured(out: Path, request: Request) -> dict[str, torch.Tensor]:
    """{name of a scale: amax / 448} by hooks on the projections of the reference model, with rotary embedding written out."""
    model = reference_model(out, Path(request.model))
    rows = text_rows(request, open_structure(request.model)).tokens
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(("k_proj", "v_proj", "k_norm")):
            module.register_forward_hook(lambda _, args, out, n=name: seen.__setitem__(n, out.detach().flatten(2)))
    with torch.no_grad():
        model(input_ids=rows, use_cache=False)
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    angles = torch.arange(rows.shape[1])[:, None] * 10000.0 ** -(torch.arange(0, width, 2) / width)
    found, differ = {}, False
    for i in range(config.num_hidden_layers):
        keys, values = (seen[f"model.layers.{i}.self_attn.{p}"] for p in ("k_proj", "v_proj"))
        keys = seen.get(f"model.layers.{i}.self_attn.k_norm", keys)
        first, second = keys.unflatten(-1, (-1, 2, width // 2)).unbind(-2)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        differ |= bool(turned.abs().max() != keys.abs().max())
        for name, x in (("k_scale", turned), ("v_scale", values)):
            found[f"model.layers.{i}.self_attn.{name}"] = x.abs().max().view(1) / 448
    assert differ  # after rotary embedding is not before it
    return found


def changed_copy(out: Path, to: Path, change, forged: bool = True) -> Path:
    """A copy with its tensors changed in place by ``change``; forged: the hash of the file in qkit.json follows."""
    shutil.copytree(out, to)
    tensors = tensors_of(to)
    change(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    if forged:
        edit_json(
            to / "qkit.json",
            lambda r: r["shards"].update({"model.safetensors": sha((to / "model.safetensors").read_bytes())}),
        )
    return to


def edit_json(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def problems(out: Path) -> list[str]:
    return [str(p) for p in verify(out).problems]


# ---- scales --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "scheme", "method"),
    [
        ("qwen2", "w4a16", "rtn"),
        ("qwen2", "w4a16", "gptq"),
        ("llama", "w4a16", "rotate+rtn"),  # turns the values of every head
        ("llama", "w3a16", "awq+rtn"),  # scales the values
        ("llama", "w4a16", "rotate+gptq"),
        ("qwen3", "w4a16", "rtn"),
        ("mistral", "fp8", "smoothquant+rtn"),  # inputs are quantized too
    ],
)
def test_scales_are_those_of_the_quantized_model(family, scheme, method, tiny, calib, tmp_path):
    changes = {"sliding_window": None} if family == "mistral" else {}
    model = str(tiny(family, torch.float32, **changes))
    request = Request(model=model, scheme=scheme, method=method, calib=calib, samples=6, seqlen=32, threads=1, kv=FP8)
    if scheme != "fp8":
        request = Request(**{**vars(request), "group_size": 32})
    assert quantize(request, tmp_path / "out", Quiet()).ok
    wanted, tensors = measured(tmp_path / "out", request), tensors_of(tmp_path / "out")
    scales = {n: t for n, t in tensors.items() if n.endswith(("k_scale", "v_scale"))}
    torch.testing.assert_close(scales, wanted, rtol=1e-4, atol=0)


def test_what_stands_in_the_checkpoint(out, request_, tmp_path):
    scheme = json.loads((out / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert {k: scheme[k] for k in ("num_bits", "type", "strategy", "dynamic", "symmetric")} == {
        "num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True
    }  # fmt: skip
    record = json.loads((out / "qkit.json").read_text())
    assert record["kv"] == FP8 and record["calibration"]["samples"] == 6
    plan, tensors = prepare(request_).plan, tensors_of(out)
    assert plan.packed_bytes == sum(t.nbytes for t in tensors.values())
    # All else is what comes out without a cache: rounding alone runs no rows.
    plain = Request(**{**vars(request_), "kv": None})
    assert quantize(plain, tmp_path / "plain", Quiet()).ok
    without = tensors_of(tmp_path / "plain")
    assert sorted(tensors.keys() - without.keys()) == sorted(
        f"model.layers.{i}.self_attn.{s}" for i in range(3) for s in ("k_scale", "v_scale")
    )
    assert all(torch.equal(tensors[n], t) for n, t in without.items())
    assert (
        json.loads((tmp_path / "plain" / "config.json").read_text())["quantization_config"]["kv_cache_scheme"] is None
    )
    # Other text, other scales.
    other = tmp_path / "other.txt"
    other.write_text("and then " * 2000)
    assert quantize(Request(**{**vars(request_), "calib": other}), tmp_path / "other", Quiet()).ok
    assert not torch.equal(
        tensors_of(tmp_path / "other")["model.layers.1.self_attn.k_scale"], tensors["model.layers.1.self_attn.k_scale"]
    )


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_scales_have_the_dtype_of_the_model(dtype, tiny, calib, tmp_path):
    request = Request(
        model=str(tiny("llama", dtype)),
        scheme="w4a16",
        method="rtn",
        group_size=32,
        calib=calib,
        samples=4,
        seqlen=32,
        threads=1,
        kv=FP8,
    )
    assert quantize(request, tmp_path / "out", Quiet()).ok
    tensors = tensors_of(tmp_path / "out")
    for name, wanted in measured(tmp_path / "out", request).items():
        assert tensors[name].dtype == dtype and tensors[name].shape == (1,)
        torch.testing.assert_close(tensors[name].float(), wanted, rtol=0.03, atol=0)  # of arithmetic in the run's dtype


def test_rows_that_are_not_finite_and_values_that_are_zero():
    cache = RangeCache()
    keys, values = torch.full((3, 2, 4, 8), 2.0), torch.zeros(3, 2, 4, 8)
    keys[0, 1, 2, 3], keys[1, 0, 0, 0], keys[2] = -7.0, torch.inf, 3.0
    cache.update(keys[:2], values[:2], 5)
    assert cache.update(keys[2:], values[2:], 5)[0] is not None and cache.get_seq_length() == 0
    assert [float(s) for s in cache.scales(5, torch.float32)] == [pytest.approx(7 / 448), 1.0]
    with pytest.raises(Unsupported, match="layer 0 puts no keys"):
        cache.scales(0, torch.float32)
    tiny = RangeCache()
    tiny.update(torch.full((1, 1, 1, 8), 1e-7), torch.full((1, 1, 1, 8), 448.0), 0)
    assert [float(s) for s in tiny.scales(0, torch.float16)] == [1.0, 1.0]  # not 0, by which nothing can be divided


# ---- runs ----------------------------------------------------------------------------------------------------------


def test_the_same_bytes_again_and_after_a_kill(out, request_, tmp_path):
    assert quantize(request_, tmp_path / "again", Quiet()).ok
    assert contents(tmp_path / "again") == contents(out)
    killed = [killed_after(request_, tmp_path / "out", after) for after in range(3, 60, 4)]
    assert killed.count(True) > 3 and not killed[-1]
    assert contents(tmp_path / "out") == contents(out)
    assert quantize(Request(**{**vars(request_), "threads": 2}), tmp_path / "two", Quiet()).ok
    assert contents(tmp_path / "two") == contents(out)


# ---- stock transformers ---------------------------------------------------------------------------------------------


def finds_scales(attention) -> bool:
    """Whether this compressed-tensors knows attention modules of this transformers: it looks for an argument of their
    forward that transformers 5.24 renamed."""
    return "past_key_values" in inspect.signature(attention.forward).parameters


def test_stock_transformers(out):
    """It loads without a word, and compressed-tensors rounds keys and values to FP8 before they go into the cache, those of the
    prompt itself too: in the first layer to what qkit's cache holds."""
    model, said = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    if not finds_scales(model.model.layers[0].self_attn):
        pytest.skip("compressed-tensors does not know the attention of this transformers yet")
    assert not any(said.values())
    tensors = tensors_of(out)
    for i, layer in enumerate(model.model.layers):
        for name in ("k_scale", "v_scale"):
            assert torch.equal(getattr(layer.self_attn, name).data, tensors[f"model.layers.{i}.self_attn.{name}"])
    ids = torch.arange(40, 72)[None]
    stock, plain, ours = DynamicCache(), DynamicCache(), qkit.load(out)
    packed = make_cache(ours, parse("fp8"))
    with torch.inference_mode():
        logits = model(ids, past_key_values=stock, use_cache=True).logits
        ours(ids, past_key_values=packed, use_cache=True)
        for layer in model.model.layers:
            layer.self_attn.quantization_enabled = False
        exact = model(ids, past_key_values=plain, use_cache=True).logits
        assert model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0).shape == (1, 38)
    for side, kept in enumerate(packed.layers[0].read()):
        found, before = ((c.layers[0].keys, c.layers[0].values)[side] for c in (stock, plain))
        torch.testing.assert_close(kept, found, rtol=1e-5, atol=1e-6)
        assert not torch.equal(found, before)
    torch.testing.assert_close(exact, ours(ids, use_cache=False).logits, rtol=1e-3, atol=1e-3)
    assert 0 < float((logits - exact).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize("family", ("phi3", "qwen3_moe"))
def test_stock_transformers_finds_the_scales_of_other_families(family, tiny, calib, tmp_path):
    request = Request(
        model=str(tiny(family)),
        scheme="w4a16",
        method="rtn",
        group_size=32,
        calib=calib,
        samples=4,
        seqlen=32,
        threads=1,
        kv=FP8,
    )
    assert quantize(request, tmp_path / "out", Quiet()).ok
    model, said = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    if not finds_scales(model.model.layers[0].self_attn):
        pytest.skip("compressed-tensors does not know the attention of this transformers yet")
    assert not any(said.values())
    packed = make_cache(qkit.load(tmp_path / "out"), parse("fp8"))
    for layer, kept in zip(model.model.layers, packed.layers, strict=True):
        assert kept.scales == (layer.self_attn.k_scale.item(), layer.self_attn.v_scale.item()) != (1.0, 1.0)


# ---- the cache -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", (1.0, 0.013, 300.0))
def test_numbers_round_to_the_nearest_code(scale):
    x = torch.randn(2, 2, 5, 16, generator=torch.Generator().manual_seed(0)) * 100 * scale
    x[0, 0, 0, :3] = torch.tensor([1e9, -1e9, 0.0])
    q = Float8.of(x, scale)
    assert q.data.dtype == torch.uint8 and q.tensors == (q.data,)
    error = (q.dequantize(torch.float32) - x).abs() / scale
    nearest = (x[..., None] / scale - GRID).abs().amin(-1)
    torch.testing.assert_close(error, nearest, rtol=1e-4, atol=1e-4)
    assert float(q.dequantize(torch.float32).abs().max()) == pytest.approx(448 * scale)
    joined = q.slice(0, 2).cat(q.slice(2, 5))
    assert torch.equal(joined.dequantize(torch.bfloat16, 1, 4), q.dequantize(torch.bfloat16)[:, :, 1:4])


def test_a_model_with_its_cache(out, request_):
    """One byte a number, the scales of the file; without any, 1."""
    model, tensors = qkit.load(out), tensors_of(out)
    ids = torch.arange(40, 72)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    cache = model.generate(ids, **options).past_key_values
    assert isinstance(cache, PackedCache)
    names = ("k_scale", "v_scale")
    for i, layer in enumerate(cache.layers):
        assert layer.scales == tuple(float(tensors[f"model.layers.{i}.self_attn.{n}"]) for n in names)
    heads = CacheShape.of(model)
    assert cache.nbytes == heads.layers * 2 * heads.heads * heads.head_dim * 39
    assert cache.nbytes == heads.layers * heads.bytes_at(parse("fp8"), 8, 39)
    assert type(qkit.load(out, kv="none").generate(ids, **options).past_key_values) is DynamicCache
    plain = make_cache(qkit.load(request_.model), parse("fp8"))
    assert [layer.scales for layer in plain.layers] == [(1.0, 1.0)] * 3
    # Decoding through it, in steps of any size, stays close to a plain cache.
    windows = torch.randint(5, 4000, (2, 48), generator=torch.Generator().manual_seed(2))
    exact = decode_windows(model, windows, 16, None)
    for step in (1, 8):
        made = decode_windows(model, windows, 16, parse("fp8"), step)
        change = (made.nll - exact.nll).abs()
        assert made.bytes == exact.plain_bytes / 2 and 0 < change.mean() < 0.1


def test_commands(out, run, tmp_path):
    code, said, _ = run(
        "quantize", "--model", "tiny-llama", "--scheme", "w4a16", "--kv", "fp8", "--samples", 4, "--seqlen", 64,
        "--method", "rtn", "--max-length", 1000, "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0 and "KV cache: fp8" in said and "0.500 of 16 bits" in said
    assert run("verify", tmp_path / "out")[0] == 0
    code, said, _ = run(
        "eval", tmp_path / "out", "--windows", 2, "--window", 200, "--kv-step", 20, "--kv", "fp8", "--kv", "int8",
        "--json", tmp_path / "e.json",
    )  # fmt: skip
    assert code == 0 and "fp8" in said
    (found,) = json.loads((tmp_path / "e.json").read_text())["caches"].values()
    assert found["fp8"]["share"] == 0.5 and 0 < abs(found["fp8"]["change_percent"]) < 1
    assert found["fp8"]["bytes"] < found["int8"]["bytes"]
    assert "fp8" in run("list", "caches")[1]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--kv", "fp8", "--kv-memory", "1MB"], 2, "--kv-memory: fp8 has one width"),
        (["--kv", "fp4"], 2, "kv policy fp4: 4 bits; expected some of 8"),
        (["--kv", "fp8", "--outliers", "0.5"], 2, "quant_method qkit"),
        (["--kv", "fp8", "--export", "qkit"], 2, "quant_method qkit"),
        (["--kv", "fp8", "--seqlen", "100000"], 2, "--seqlen 100000"),
    ],
)
def test_what_cannot_be_asked_for(options, code, words, run, tmp_path):
    found, _, err = run("quantize", "--model", "tiny-llama", "--scheme", "w4a16", "--out", tmp_path / "out", *options)
    assert found == code and words in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_attention_that_has_no_place_for_scales(run, tiny, small, tmp_path):
    found = {
        "gpt_neox": "needs num_key_value_heads",
        "opt": "needs num_key_value_heads",
    }
    for family, words in found.items():
        options = ["--scheme", "w4a16", "--kv", "fp8", "--out", tmp_path / "out", *small]
        code, _, err = run("quantize", "--model", tiny(family), *options)
        assert code == 3 and words in err
    structure = open_structure(str(tiny("gpt_neox")))
    structure.model.config.num_key_value_heads = 4
    with pytest.raises(Unsupported, match="no attention module with k_proj"):
        tensor_names(structure, "fp")


# ---- the proof -----------------------------------------------------------------------------------------------------

NAME = "model.layers.1.self_attn.v_scale"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({NAME: t[NAME] * 2}), "its bytes are not those that were copied"),
        (lambda t: t.pop(NAME), f"{NAME}: is missing: engines take 1"),
        (lambda t: t.update({NAME: t[NAME][0]}), "expected BF16 or F16 or F32 [1]"),
        (lambda t: t.update({NAME: -t[NAME]}), "expected a positive number"),
        (lambda t: t.update({NAME: t[NAME] * torch.inf}), "expected a positive number"),
        (lambda t: t.update({"model.norm.k_scale": t[NAME] * 1}), "that config.json does not ask for"),
    ],
)
def test_a_scale_that_is_not_what_it_was(change, words, out, tmp_path):
    assert any(words in line for line in problems(changed_copy(out, tmp_path / "bad", change)))


def test_a_changed_scale_shows_in_the_hash_of_the_file(out, tmp_path):
    bad = changed_copy(out, tmp_path / "bad", lambda t: t.update({NAME: t[NAME] * 2}), forged=False)
    assert any("model.safetensors: its sha256" in line for line in problems(bad))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q: q.pop("kv_cache_scheme"), "has static scales"),
        (lambda q: q["kv_cache_scheme"].update(strategy="token", dynamic=True), "kv_cache_scheme.dynamic: found true"),
        (lambda q: q["kv_cache_scheme"].update(type="int"), 'kv_cache_scheme.type: found "int"'),
    ],
)
def test_a_scheme_that_is_not_what_was_measured(change, words, out, tmp_path):
    bad = Path(shutil.copytree(out, tmp_path / "bad"))
    edit_json(bad / "config.json", lambda c: change(c["quantization_config"]))
    assert any("kv_cache_scheme" in line and words in line for line in problems(bad))
    shutil.copy(out / "config.json", bad / "config.json")
    edit_json(bad / "qkit.json", lambda r: r["kv"].update(kind="rtn"))
    assert any("has no static scales" in line for line in problems(bad))


def test_a_forged_record_does_not_help(out, tmp_path):
    """A scale that is gone from the record as well is still missed."""
    bad = changed_copy(out, tmp_path / "bad", lambda t: t.pop(NAME))
    edit_json(bad / "qkit.json", lambda r: r["plain"].pop(NAME))
    assert f"{NAME}: is missing: engines take 1 for it" in problems(bad)
    with pytest.raises(BadCheckpoint, match="v_scale"):
        qkit.load(bad)
