"""Low-rank parts: what a branch fits, its bytes, and packed checkpoints that hold one beside their codes."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import qkit_data
import tiny_models
import torch
import transformers
from conftest import Quiet
from safetensors.torch import load_file, save_file

import qkit
from qkit.engine import solving
from qkit.errors import BadCheckpoint, BadRecipe, Unsupported, UsageError
from qkit.families.blocks import Linear
from qkit.files.safefile import read_header
from qkit.nn import ops
from qkit.rounding.learned_weight import LearnedWeight
from qkit.sensitivity.profile import Profile
from qkit.tensor import lowrank
from qkit.tensor.formats import FORMATS, scheme
from qkit.tensor.input_transform import PLAIN
from qkit.tensor.lowrank import LowRank, factors, find
from qkit.tensor.qtensor import QTensor, dequantize, find_params
from qkit.tensor.qtensor import quantize as to_codes
from qkit.tensor.sparse import split
from qkit.verification.verify import verify
from qkit.workflows.quantize import Request, prepare, quantize

SHAPES = [(40, 24), (24, 40), (33, 33)]  # the Gram matrix of either side


def inputs(columns: int, tokens: int = 200) -> torch.Tensor:
    """float64 [tokens, in]: channels of very different sizes, correlated."""
    g = torch.Generator().manual_seed(columns)
    x = torch.randn(tokens, columns, generator=g, dtype=torch.float64) * torch.logspace(-1, 1, columns)
    return x @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=g)).double()


def error_of(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)) * 0.01


# ---- the fit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_what_is_left_are_the_dropped_singular_values(shape, rank):
    """Eckart and Young, with the root of the damped Hessian by another route: its eigenvectors."""
    error, x = error_of(shape), inputs(shape[1])
    hessian = (x.T @ x / len(x)).float()
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(shape[1])
    values, vectors = torch.linalg.eigh(damped)
    root = vectors * values.sqrt()
    down, up = factors(error, hessian, rank)
    left = float(((error.double() - up @ down) @ root).square().sum())
    dropped = float(torch.linalg.svdvals(error.double() @ root)[rank:].square().sum())
    assert left == pytest.approx(dropped, rel=1e-9)
    plain_down, plain_up = factors(error, None, rank)
    singular = torch.linalg.svdvals(error.double())[rank:].square().sum()
    assert float((error.double() - plain_up @ plain_down).square().sum()) == pytest.approx(float(singular), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_whitened_is_better_where_outputs_see_it(shape):
    """On the tokens that it was fitted to, by a third at least; and plain SVD where the error itself is looked at."""
    error, x = error_of(shape), inputs(shape[1])
    hessian = (x.T @ x / len(x)).float()
    made = {name: dequantized(find(error, h, 6)) for name, h in (("whitened", hessian), ("plain", None))}
    seen = {name: float((x @ (error - b).double().T).square().sum()) for name, b in made.items()}
    itself = {name: float((error - b).square().sum()) for name, b in made.items()}
    assert seen["whitened"] < 0.66 * seen["plain"] and itself["plain"] < itself["whitened"]


def dequantized(b: LowRank) -> torch.Tensor:
    return b.up.float() @ b.down.float()


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_exact(shape):
    error, x = error_of(shape), inputs(shape[1])
    down, up = factors(error, (x.T @ x).float(), min(shape))
    torch.testing.assert_close(up @ down, error.double(), rtol=1e-9, atol=1e-12)
    both = dequantized(find(error, None, min(shape), torch.float16))
    assert tiny_models.relative(both, error) < 2e-3


@pytest.mark.parametrize("bad", ["zero", "nan", "none"])
def test_inputs_without_a_direction(bad):
    """Inputs that were never active, a Hessian that is not finite, an error of zero: finite factors in every case."""
    error = error_of((16, 32)) * (bad != "none")
    hessian = {"zero": torch.zeros(32, 32), "nan": torch.full((32, 32), torch.nan), "none": torch.eye(32)}[bad]
    branch = find(error, hessian, 3)
    assert branch.down.isfinite().all() and branch.up.isfinite().all()
    if bad == "nan":
        assert torch.equal(branch.down, find(error, None, 3).down)


def test_signs_and_sizes_are_settled():
    down, up = factors(error_of((48, 64)), None, 8)
    assert bool((up.gather(0, up.abs().argmax(0, keepdim=True)) > 0).all())
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))
    assert bool((up.norm(dim=0).diff() <= 1e-12).all())  # the largest first


@pytest.mark.parametrize(("dtype", "kept"), [(torch.float32, torch.bfloat16), (torch.float16, torch.float16)])
def test_bytes_and_tensors(dtype, kept):
    branch = find(error_of((40, 24)), None, 5, dtype)
    stored = lowrank.write(branch)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in stored.items()} == lowrank.specs((40, 24), 5, dtype)
    assert stored["low_rank_down"].dtype == kept and stored["low_rank_down"].shape == (5, 24)
    assert sum(t.nbytes for t in stored.values()) == lowrank.low_rank_bytes((40, 24), 5) == 2 * 5 * 64
    assert lowrank.specs((40, 24), 0, dtype) == {} and lowrank.read({}, (40, 24)) is None
    back = lowrank.read(stored, (40, 24))
    assert back is not None and back.rank == 5 and torch.equal(back.up, branch.up)


# ---- the product -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "activations", "dtype", "outliers"),
    [
        ("int4", None, torch.bfloat16, 0),
        ("int3", None, torch.float32, 30),
        ("int8_channel", "w8a8", torch.float32, 0),
        ("nvfp4", None, torch.bfloat16, 0),
    ],
)
def test_linear_adds_it(name, activations, dtype, outliers):
    """Codes, sparse part and branch meet the same inputs: the quantized ones where the scheme quantizes them."""
    fmt, acts = FORMATS[name], scheme(activations).activations if activations else None
    g = torch.Generator().manual_seed(3)
    w = torch.randn(64, 128, generator=g) * 0.1
    rest, taken = split(w, outliers, torch.bfloat16) if outliers else (w, None)
    bare = replace(to_codes(rest, find_params(rest, fmt, torch.bfloat16), fmt), sparse=taken)
    q = replace(bare, low_rank=find(torch.randn(64, 128, generator=g) * 0.1, None, 4))
    x, bias = torch.randn(5, 128, generator=g).to(dtype), torch.randn(64, generator=g).to(dtype)
    seen = x.float()
    if acts is not None:
        scales = seen.abs().amax(-1, keepdim=True) / 127.5
        seen = (seen / scales).round().clamp(-128, 127) * scales
    prepared = ops.prepare(q, acts, dtype)
    wanted = seen.double() @ (dequantize(bare) + dequantized(q.low_rank)).double().T + bias.double()
    found = ops.linear(x, prepared, bias, acts, None).double()
    assert float((found - wanted).norm() / wanted.norm()) < (1e-5 if dtype == torch.float32 else 2e-2)
    without = seen.double() @ dequantize(bare).double().T + bias.double()
    assert float((found - without).norm() / wanted.norm()) > 0.05
    held = prepared.nbytes - ops.prepare(bare, acts, dtype).nbytes
    assert acts is not None or held == q.low_rank.down.nbytes + q.low_rank.up.nbytes


def test_it_stays_where_rounding_is_learned():
    """It is no part of what is learned, and comes out as it went in."""
    g = torch.Generator().manual_seed(5)
    w, fmt = torch.randn(24, 128, generator=g) * 0.1, FORMATS["int3"].with_group(32)
    branch = find(torch.randn(24, 128, generator=g) * 0.05, None, 3)
    left = w - dequantized(branch)
    q = replace(to_codes(left, find_params(left, fmt, torch.bfloat16), fmt), low_rank=branch)
    x = LearnedWeight.of(Linear(name="a", param="a.weight", shape=(24, 128)), w, q, PLAIN)
    begun = x.begin()
    torch.testing.assert_close(x.dense(*begun), dequantize(q), rtol=1e-5, atol=1e-6)
    assert float(begun[0].abs().max()) < 1.2  # no more than a cell away from where rounding put it
    assert torch.equal(dequantize(x.finish(*begun)), dequantize(q))


# ---- packed checkpoints ----------------------------------------------------------------------------------------


def asked(model, calib, scheme="w3a16", method="gptq", **more) -> Request:
    return Request(
        model=str(model),
        scheme=scheme,
        method=method,
        **{"calib": calib, "samples": 8, "seqlen": 32, "threads": 1, "rank": 4, **more},
    )


@pytest.mark.parametrize(
    ("family", "scheme", "method", "more"),
    [
        ("llama", "w3a16", "gptq", {}),
        ("llama", "w4a16_asym", "rtn", {"outliers": 1.0}),  # without rows
        ("opt", "w4a8", "smoothquant+gptq", {}),
        ("llama", "nvfp4", "residual+gptq", {}),
        ("mixtral", "w4a16", "gptq", {"rank": 2}),
        ("llama", "w3a16", "signround", {"options": {"steps": 3}, "significant": 0.2}),
    ],
)
def test_packed_loaded_and_run(family, scheme, method, more, tiny, calib, tmp_path):
    """Written, proven, loaded by qkit and by transformers with qkit imported; bytes as planned; codes and branch run."""
    request, out = asked(tiny(family), calib, scheme, method, **more), tmp_path / "out"
    plan = prepare(request).plan
    assert plan.export == "qkit" and all(p.rank == request.rank for p in plan.linears.values())
    report = quantize(request, out, Quiet())
    assert report.ok
    header = read_header(out / "model.safetensors")
    size = sum(i.nbytes for i in header.values())
    assert size == plan.packed_bytes if not request.significant else size == pytest.approx(plan.packed_bytes, rel=0.005)
    record = json.loads((out / "qkit.json").read_text())["linears"]
    assert all(r["rank"] == request.rank and r["error"] <= r["baseline_error"] for r in record.values())
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["low_rank"] == sorted(plan.linears)
    stored, ids = load_file(out / "model.safetensors"), tiny_models.tokens()
    loaded = qkit.load(out, dtype=torch.float32)
    ours = tiny_models.logits(loaded, ids)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    torch.testing.assert_close(tiny_models.logits(theirs, ids), ours, rtol=1e-4, atol=1e-4)
    for name in (n for n in plan.linears if "experts" not in n):
        packed = loaded.get_submodule(
            next(n for n, _ in loaded.named_modules() if n.endswith(name.removeprefix("model.")))
        )
        q = ops.unpacked(packed.packed)
        branch = stored[f"{name}.low_rank_up"].float() @ stored[f"{name}.low_rank_down"].float()
        torch.testing.assert_close(dequantize(q), dequantize(replace(q, low_rank=None)) + branch)
        assert float(branch.abs().max()) > 0


def test_logits_are_those_of_the_dense_weights(tiny, calib, tmp_path):
    """Weights as numpy makes them of the file, put into the original: codes, scales, and the branch."""
    model, out = tiny("llama"), tmp_path / "out"
    quantize(asked(model, calib, "w8a16", group_size=32), out, Quiet())
    stored = load_file(out / "model.safetensors")
    dense = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for name in json.loads((out / "qkit.json").read_text())["linears"]:
        t = {k: stored[f"{name}.{k}"] for k in ("weight_packed", "weight_scale", "low_rank_down", "low_rank_up")}
        words = t["weight_packed"].numpy().view(np.uint8)  # eight bits: a code a byte
        scale = t["weight_scale"].float().repeat_interleave(32, 1)
        codes = torch.from_numpy(words.astype(np.float32)[:, : scale.shape[1]]) - 128
        weight = codes * scale + t["low_rank_up"].float() @ t["low_rank_down"].float()
        dense.get_submodule(name).weight.data.copy_(weight)
    ids = tiny_models.tokens()
    ours = tiny_models.logits(qkit.load(out, dtype=torch.float32), ids)
    torch.testing.assert_close(ours, tiny_models.logits(dense, ids), rtol=1e-4, atol=1e-4)


def test_a_run_is_the_same_on_any_number_of_threads(tiny, calib, tmp_path):
    found = []
    for threads in (1, 2):
        out = tmp_path / str(threads)
        quantize(asked(tiny("llama"), calib, threads=threads, rank={"*.mlp.*": 3, "*.q_proj": 8}), out, Quiet())
        found.append((out / "model.safetensors").read_bytes())
    assert found[0] == found[1]
    ranks = {n: i.shape[0] for n, i in read_header(out / "model.safetensors").items() if n.endswith("low_rank_down")}
    assert {n.split(".")[4]: r for n, r in ranks.items()} == {"gate_proj": 3, "up_proj": 3, "down_proj": 3, "q_proj": 8}


def test_it_brings_a_trained_model_closer(tmp_path):
    """By GPTQ at 2 bits: with a branch of rank 16 the loss changes by less than three quarters of what it did."""
    model = qkit_data.model_path(qkit_data.models()[0])
    request = Request(model=str(model), scheme="w2a16", method="gptq", samples=24, seqlen=128, threads=1)
    tokens = prepare(request).plan.calibration.tokens
    losses = []
    for rank in (None, 0, 16):
        if rank is not None:
            quantize(replace(request, rank=rank), tmp_path / str(rank), Quiet())
        loaded = qkit.load(model if rank is None else tmp_path / str(rank), dtype=torch.float32)
        with torch.inference_mode():
            losses.append(float(loaded(input_ids=tokens, labels=tokens).loss))
    plain, less = losses[1] - losses[0], losses[2] - losses[0]
    assert plain > 0.05 and less < 0.75 * plain


@pytest.mark.parametrize(("method", "whitened"), [("rtn", False), ("gptq", True), ("signround", True), ("awq", True)])
def test_outputs_count_where_rows_are_run(method, whitened, tiny, calib, tmp_path, monkeypatch):
    """Every fit gets the Hessian of its inputs, whatever the solver, once rows are run at all."""
    seen = []

    def watched(error, hessian, *rest):
        seen.append(None if hessian is None else hessian.shape[0] == error.shape[1])
        return find(error, hessian, *rest)

    monkeypatch.setattr(lowrank, "find", watched)
    more = {"options": {"steps": 1}} if method == "signround" else {}
    quantize(asked(tiny("llama"), calib, method=method, **more), tmp_path / "out", Quiet())
    assert len(seen) == 14 * (solving.ROUNDS + 2) and set(seen) == {True if whitened else None}


def test_solving_anew_pays_and_never_costs(calib, tmp_path, monkeypatch):
    """Of linears whose inputs are those of the original, with and without the rounds after the first."""
    model, found = qkit_data.model_path(qkit_data.models()[0]), []
    for rounds in (0, solving.ROUNDS):
        monkeypatch.setattr(solving, "ROUNDS", rounds)
        out = tmp_path / str(rounds)
        skip = ({"match": "*.layers.[1-9]*", "skip": "one block is enough"},)
        quantize(asked(model, calib, seqlen=64, rank=8, rules=skip), out, Quiet())
        record = json.loads((out / "qkit.json").read_text())["linears"]
        found.append([record[f"model.layers.0.self_attn.{n}_proj"] for n in "qkv"])
    first, best = (sum(r["error"] for r in own) for own in found)
    assert best < 0.9 * first
    assert [r["baseline_error"] for r in found[0]] == [r["baseline_error"] for r in found[1]]
    worse = [SimpleNamespace(error=3.0)]
    kept = [SimpleNamespace(error=2.0)]
    assert solving._better_results(kept, worse) is kept


def test_damage_is_found(tiny, calib, tmp_path):
    """A changed value, a missing tensor, another shape, a value that is not finite, records that say otherwise."""
    out = tmp_path / "out"
    quantize(asked(tiny("llama"), calib), out, Quiet())
    name = "model.layers.0.self_attn.q_proj"
    down, up = f"{name}.low_rank_down", f"{name}.low_rank_up"

    def broken(change) -> str:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(out, copy)
        tensors, record = load_file(copy / "model.safetensors"), json.loads((copy / "qkit.json").read_text())
        config = json.loads((copy / "config.json").read_text())
        change(tensors, record, config["quantization_config"])
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
        (copy / "qkit.json").write_text(json.dumps(record))
        (copy / "config.json").write_text(json.dumps(config))
        return " | ".join(f"{p.where} {p.what}" for p in verify(copy).problems)

    assert "its bytes are not those that were copied" in broken(lambda t, r, c: t[up][3].mul_(1.5))
    assert f"{down} is missing" in broken(lambda t, r, c: t.pop(down))
    assert "found BF16 [3, 64], expected" in broken(lambda t, r, c: t.update({down: t[down][:3].clone()}))
    assert "low_rank_up 4 values are NaN or infinite" in broken(lambda t, r, c: t[up][3].fill_(torch.inf))
    assert "is missing" in broken(lambda t, r, c: r["plain"].pop(up) and t.pop(up))
    assert "belongs to no linear" in broken(lambda t, r, c: r["linears"][name].pop("rank") and r["plain"].pop(up))
    assert "expected a rank of the weight" in broken(lambda t, r, c: r["linears"][name].update(rank=65))
    assert "linears with a low-rank part" in broken(lambda t, r, c: c["low_rank"].remove(name))
    assert "no other loader knows" in broken(lambda t, r, c: c.update(quant_method="compressed-tensors"))
    (tmp_path / "copy" / "model.safetensors").unlink()
    tensors = load_file(out / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != up}, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadCheckpoint, match="low_rank_up"):
        qkit.load(tmp_path / "copy")
    tensors[up] = tensors[up][:, :3].contiguous()
    save_file(tensors, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadCheckpoint, match="does not fit a weight of"):
        qkit.load(tmp_path / "copy")


# ---- candidates and commands -----------------------------------------------------------------------------------


def test_more_bits_or_a_branch(run, tiny, tmp_path, small):
    """The allocator chooses per layer; predicted bytes are the file's, and the branch is there where it was chosen."""
    model, folder, out = tiny("llama"), tmp_path / "profile", tmp_path / "out"
    names = "int2,int2+r2,int3,int3+1%+r4"
    options = ("--model", model, "--group-size", 32, "--rows", 4, "--points", 2)
    code, _, err = run("profile", *options, "--candidates", names, "--measures", "weight", "--out", folder, *small)
    assert code == 0, err
    unit = Profile.load(folder).units[0]
    shapes = {n.removesuffix(".weight"): i.shape for n, i in read_header(model / "model.safetensors").items()}
    more = unit.choices["W2A16+r2"].bytes - unit.choices["W2A16"].bytes
    assert more == sum(2 * 2 * sum(shapes[n]) for n in unit.linears)
    common = ("--model", model, "--profile", folder, "--measure", "weight", *small)
    code, said, err = run("quantize", *common, "--bits", 4, "--out", out)
    assert code == 0 and "+r" in said, err
    code, _, err = run("plan", *common, "--bits", 4, "--explain", "--json", tmp_path / "plan.json")
    assert code == 0, err
    allocation = json.loads((tmp_path / "plan.json").read_text())["allocation"]
    header = read_header(out / "model.safetensors")
    assert sum(i.nbytes for n, i in header.items() if "_proj." in n) == allocation["bytes"] <= allocation["limit"]
    chosen = {n: layer["format"] for layer in allocation["layers"] for n in layer["linears"]}
    assert (
        {n for n, f in chosen.items() if "+r" in f}
        == {n.removesuffix(".low_rank_up") for n in header if n.endswith(".low_rank_up")}
        != set()
    )
    assert run("verify", out)[0] == 0
    code, _, err = run("quantize", *common, "--bits", 4, "--rank", 4, "--out", tmp_path / "no")
    assert code == 2 and "leave --outliers, --rank" in err


@pytest.mark.parametrize("wrong", ["int3+r", "int3+r0", "int3+r1.5", "int3+r4+r8", "int3+1%+2%", "int3+4r", "bf16+r4"])
def test_candidates_that_make_no_sense(wrong, run, tiny, tmp_path, small):
    code, _, err = run("profile", "--model", tiny("llama"), "--candidates", wrong, "--out", tmp_path / "p", *small)
    assert code == 2 and "--candidates" in err and not (tmp_path / "p").exists()


def test_ranks_that_cannot_be(run, tiny, calib, tmp_path, small):
    base = ("quantize", "--model", tiny("llama"), "--scheme", "w3a16", "--out", tmp_path / "out", *small)
    for more, words in (
        (("--rank", -1), "--rank -1: expected 0, for none, or more"),
        (("--rank", 40), "is no smaller than its"),
        (("--rank", "x"), "--rank"),
    ):
        code, _, err = run(*base, *more)
        assert code == 2 and words in err and len(err.strip().splitlines()) <= 4, err
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadRecipe, match="rank -3: expected 0, for none, or more"):
        prepare(asked(tiny("llama"), calib, rank={"*": -3}))
    with pytest.raises(Unsupported, match="no place for the low-rank part"):
        prepare(asked(tiny("llama"), calib, export="compressed-tensors"))
    plain = prepare(asked(tiny("llama"), calib, rank=0)).plan
    assert plain.export == "compressed-tensors" and not any(p.rank for p in plain.linears.values())


def test_the_break_even_is_exact(tiny, calib):
    """The rank that is named as the largest is taken, and the next one is refused."""
    with pytest.raises(UsageError, match="at most") as refused:
        prepare(asked(tiny("llama"), calib, rank=50))
    name, most = str(refused.value).split(":")[0], int(str(refused.value).rsplit(" ", 1)[1])
    assert 0 < most < 50
    p = prepare(asked(tiny("llama"), calib, rank={name: most})).plan.linears[name]
    assert p.rank == most
    with pytest.raises(UsageError, match=f"at most {most}"):
        prepare(asked(tiny("llama"), calib, rank={name: most + 1}))


def test_a_diffusion_transformer(tmp_path):
    """Inputs turned, scaled and quantized by step: the branch is a part of the weight for these."""
    pytest.importorskip("diffusers", reason="needs diffusers: pip install 'qkit[diffusion]'")
    from tiny_dits import make_pipeline

    source, out = make_pipeline(tmp_path / "wan", steps=3), tmp_path / "out"
    assert quantize(
        Request(model=str(source), scheme="nvfp4", method="hadamard+gptq", samples=8, rank=2, threads=1), out, Quiet()
    ).ok
    made = [m for m in qkit.load(out).transformer.modules() if hasattr(m, "packed")]
    assert len(made) >= 20 and all(m.packed.q.low_rank.rank == 2 for m in made)
    assert isinstance(ops.unpacked(made[0].packed), QTensor)
