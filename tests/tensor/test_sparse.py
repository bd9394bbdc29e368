"""Dense-and-sparse weights: the CSR part, ReQuant's ratios and detachment, and packed checkpoints that hold them."""

import json
from dataclasses import replace

import pytest
import qkit_data
import tiny_models
import torch
import transformers
from conftest import Quiet
from hypothesis import given, settings
from hypothesis import strategies as st

import qkit
from qkit.errors import BadRecipe, Unsupported
from qkit.files.safefile import read_header, read_tensor
from qkit.nn import ops
from qkit.sensitivity.repair import detach, largest_scores
from qkit.tensor import sparse
from qkit.tensor.formats import FORMATS
from qkit.tensor.qtensor import QTensor, dequantize, find_params
from qkit.tensor.qtensor import quantize as to_codes
from qkit.workflows.quantize import Request, prepare, quantize
from qkit.workflows.requant import ratios, search_outliers


def dense_of(s: sparse.Sparse, shape: tuple[int, int]) -> torch.Tensor:
    """Element by element, from the definition of CSR."""
    found = torch.zeros(shape)
    for row in range(shape[0]):
        for i in range(int(s.rows[row]), int(s.rows[row + 1])):
            found[row, int(s.columns[i])] = s.values[i].float()
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.sampled_from([1, 7, 256, 300]), st.integers(0, 60), st.integers(0, 10**6))
def test_split_is_a_partition(rows, columns, count, seed):
    """Dense and sparse hold every weight once, the largest in the sparse part; bytes are the formula's."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16().float()
    count = min(count, w.numel())
    dense, s = sparse.split(w, count, torch.bfloat16)
    assert s.nnz == count
    assert torch.equal(dense + dense_of(s, (rows, columns)), w)
    if 0 < count < w.numel():
        assert s.values.abs().min() >= dense.abs().max()
    stored = sparse.write(s, (rows, columns))
    column = 1 if columns <= 256 else 2
    expected = count * (2 + column) + 2 * (rows + 1) if count else 0
    assert sparse.sparse_bytes((rows, columns), count, torch.bfloat16) == expected
    assert not count or sum(t.nbytes for t in stored.values()) == expected
    assert {k: (t.dtype, tuple(t.shape)) for k, t in stored.items()} == {
        **{k: (t.dtype, tuple(t.shape)) for k, t in stored.items() if not count},
        **sparse.specs((rows, columns), count, torch.bfloat16),
    }
    back = sparse.read(stored)
    assert torch.equal(dense_of(back, (rows, columns)), dense_of(s, (rows, columns)))
    middle = rows // 2
    halves = [s.slice(0, middle), s.slice(middle, rows)]
    joined = torch.cat([dense_of(h, (n, columns)) for h, n in zip(halves, (middle, rows - middle), strict=True)])
    assert torch.equal(joined, dense_of(s, (rows, columns)))


def test_index_widths():
    assert sparse.index_dtypes((8, 256), 5) == (torch.uint16, torch.uint8)
    assert sparse.index_dtypes((8, 257), 65535) == (torch.uint16, torch.uint16)
    assert sparse.index_dtypes((8, 65537), 65536) == (torch.int32, torch.int32)
    assert sparse.value_dtype(torch.float32) == torch.bfloat16 and sparse.value_dtype(torch.float16) == torch.float16


def test_of_equal_magnitudes_the_first_are_taken():
    w = torch.tensor([[1.0, -2.0, 2.0], [2.0, -1.0, 2.0]])
    assert sparse.largest(w, 3).tolist() == [1, 2, 3]


def test_merge_keeps_both_and_prefers_the_later():
    below = sparse.make(torch.tensor([1, 4]), torch.tensor([1.0, 2.0]).bfloat16(), (2, 3))
    above = sparse.make(torch.tensor([0, 4, 5]), torch.tensor([3.0, 4.0, 5.0]).bfloat16(), (2, 3))
    merged = sparse.merge(below, above, (2, 3))
    assert torch.equal(dense_of(merged, (2, 3)), torch.tensor([[3.0, 1.0, 0.0], [0.0, 4.0, 5.0]]))
    assert sparse.merge(None, above, (2, 3)) is above


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_product(tokens, monkeypatch):
    monkeypatch.setattr(sparse, "_PRODUCT_ELEMENTS", 200)  # several steps
    w = torch.randn(12, 33)
    _, s = sparse.split(w, 50, torch.bfloat16)
    x = torch.randn(2, tokens, 33)
    wanted = x.double() @ dense_of(s, (12, 33)).double().T
    torch.testing.assert_close(sparse.product(x, s).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "dtype", "op"),
    [
        ("int4", torch.bfloat16, "int4pack"),
        ("int4", torch.float32, "bag"),
        ("nvfp4", torch.bfloat16, "dequantize"),
        ("int8_channel", torch.bfloat16, "int8pack"),
    ],
)
def test_linear_adds_the_sparse_part(name, dtype, op):
    fmt = FORMATS[name]
    w = torch.randn(64, 128) * 0.1
    w[3, 7], w[31, 127] = 9.0, -8.0
    dense, s = sparse.split(w, 2, torch.bfloat16)
    q = QTensor(
        *(lambda t: (t.codes, t.params, t.format))(to_codes(dense, find_params(dense, fmt, torch.bfloat16), fmt)), s
    )
    assert dequantize(q)[3, 7] == 9.0 and dequantize(q)[31, 127] == -8.0
    prepared = ops.prepare(q, None, dtype)
    assert prepared.op == op
    x = torch.randn(4, 128).to(dtype)
    found = ops.linear(x, prepared, None, None, None)
    wanted = x.double() @ dequantize(q).double().T
    assert (found.double() - wanted).norm() / wanted.norm() < (1e-5 if dtype == torch.float32 else 2e-2)
    bare = ops.prepare(QTensor(q.codes, q.params, fmt), None, dtype)
    assert prepared.nbytes - bare.nbytes == s.rows.nbytes + s.columns.nbytes + s.values.nbytes


# ---- ReQuant ---------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.floats(1e-9, 1.0), st.integers(100, 100_000)), min_size=1, max_size=8),
    st.floats(0.01, 5.0),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
)
def test_ratios_spend_the_share(layers, percent, t):
    sensitivity = {str(i): m for i, (m, _) in enumerate(layers)}
    sizes = {str(i): n for i, (_, n) in enumerate(layers)}
    found = ratios(sensitivity, sizes, percent, t)
    assert sum(found[n] * sizes[n] for n in sizes) == pytest.approx(percent * sum(sizes.values()))
    assert all(0 <= r <= 10 + 1e-9 for r in found.values())
    if t == 0:
        assert all(r == pytest.approx(percent) for r in found.values())
    ranked = sorted(sensitivity, key=sensitivity.get)
    assert [found[n] for n in ranked] == sorted(found.values()) or t == 0


def test_most_ranks_over_the_whole_model():
    scores = {"a": torch.tensor([0.1, 0.9, 0.3]), "b": torch.tensor([0.8, 0.05]), "c": torch.tensor([0.2])}
    assert {n: p.tolist() for n, p in largest_scores(scores, 3).items()} == {"a": [1, 2], "b": [0], "c": []}
    assert sum(len(p) for p in largest_scores(scores, 100).values()) == 6


def test_detached_weights_have_their_values():
    w = (torch.randn(16, 64) * 0.1).bfloat16().float()
    fmt = FORMATS["int3"].with_group(32)
    dense, s = sparse.split(w, 10, torch.bfloat16)
    q = to_codes(dense, find_params(dense, fmt, torch.bfloat16), fmt)
    q = QTensor(q.codes, q.params, q.format, s)
    places = torch.cat((sparse.largest(w, 12)[:4], torch.tensor([1000, 1001]))).unique()  # some of them outliers
    found = dequantize(detach(q, w, places, torch.bfloat16))
    torch.testing.assert_close(found.flatten()[places], w.flatten()[places], rtol=2**-8, atol=1e-4)
    others = torch.ones(w.numel(), dtype=torch.bool)
    others[places] = False
    assert torch.equal(found.flatten()[others], dequantize(q).flatten()[others])
    assert torch.equal(dequantize(detach(q, w, torch.arange(w.numel()), torch.bfloat16)).bfloat16(), w.bfloat16())


# ---- packed checkpoints ----------------------------------------------------------------------------------------


def asked(model, calib, scheme="w3a16", method="rtn", **more) -> Request:
    return Request(model=str(model), scheme=scheme, method=method, calib=calib, samples=8, seqlen=32, threads=1, **more)


@pytest.mark.parametrize(
    ("family", "scheme", "method"),
    [
        ("llama", "w3a16", "rtn"),
        ("llama", "w4a16_asym", "awq+gptq"),
        ("mixtral", "nvfp4a16", "gptq"),
        ("opt", "w4a8", "rtn"),
    ],
)
def test_packed_loaded_and_run(family, scheme, method, tiny, calib, tmp_path):
    """Written, proven, loaded by qkit and by transformers with qkit imported; bytes as planned; sums as intended."""
    request = asked(tiny(family), calib, scheme, method, outliers=1.0, significant=0.5)
    plan = prepare(request).plan
    assert plan.export == "qkit"
    out = tmp_path / "out"
    report = quantize(request, out, Quiet())
    assert report.ok and report.checks["plain"] > 0
    header = read_header(out / "model.safetensors")
    assert sum(i.nbytes for i in header.values()) == pytest.approx(plan.packed_bytes, rel=0.005)
    record = json.loads((out / "qkit.json").read_text())["linears"]
    kept = sum(r.get("sparse", 0) for r in record.values())
    outliers = sum(p.outliers for p in plan.linears.values())
    assert outliers < kept <= outliers + plan.significant
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "qkit" and set(config["sparse"]) == {
        n for n, r in record.items() if r.get("sparse")
    }
    ids = tiny_models.tokens()
    ours = tiny_models.logits(qkit.load(out, dtype=torch.float32), ids)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    torch.testing.assert_close(tiny_models.logits(theirs, ids), ours, rtol=1e-4, atol=1e-4)


def test_outliers_keep_their_bits(tiny, calib, tmp_path):
    """Rounding leaves 0 where an outlier was taken out: what is loaded there is the original to the bit."""
    model, out = tiny("llama"), tmp_path / "out"
    quantize(asked(model, calib, outliers={"*.down_proj": 2.0}), out, Quiet())
    packed, source = read_header(out / "model.safetensors"), read_header(model / "model.safetensors")
    names = [n.removesuffix(".sparse_values") for n in packed if n.endswith("sparse_values")]
    assert names and all(n.endswith("down_proj") for n in names)
    loaded = qkit.load(out, dtype=torch.float32)
    for name in names:
        w = read_tensor(source[f"{name}.weight"]).float()
        places = sparse.largest(w, round(0.02 * w.numel()))
        found = dequantize(ops.unpacked(loaded.get_submodule(name).packed))
        assert torch.equal(found.flatten()[places], w.flatten()[places])


def test_what_the_loss_depends_on_is_put_back(tmp_path):
    """Of a trained model, half a percent of the weights takes more than 4 % of the loss change away, on few tokens."""
    model = qkit_data.model_path(qkit_data.models()[0])
    request = Request(model=str(model), scheme="w3a16", method="rtn", samples=12, seqlen=128, significant=0.5)
    tokens = prepare(request).plan.calibration.tokens
    losses = []
    for i, percent in enumerate((None, 0.0, 0.5)):
        if percent is not None:
            quantize(replace(request, significant=percent), tmp_path / str(i), Quiet())
        loaded = qkit.load(model if percent is None else tmp_path / str(i), dtype=torch.float32)
        with torch.inference_mode():
            losses.append(float(loaded(input_ids=tokens, labels=tokens).loss))
    whole, left = losses[1] - losses[0], losses[2] - losses[0]
    assert whole > 0.03 and left < 0.96 * whole


def test_compressed_tensors_has_no_place_for_it(tiny, calib):
    with pytest.raises(Unsupported, match="no place for the sparse part"):
        prepare(asked(tiny("llama"), calib, outliers=0.5, export="compressed-tensors"))
    with pytest.raises(BadRecipe, match="outliers 90: expected a percentage from 0 to 20"):
        prepare(asked(tiny("llama"), calib, outliers=90.0))


def test_requant_command(run, tiny, small, tmp_path):
    """The search says what it chose, the run goes on with the chosen trial, and asking again is done at once."""
    out = tmp_path / "out"
    command = (
        "quantize",
        "--model",
        tiny("llama"),
        "--scheme",
        "w3a16",
        "--method",
        "requant+awq+gptq",
        "--out",
        out,
        *small,
    )
    code, said, err = run(*command, "--outliers", 1, "--significant", 0.5)
    assert code == 0 and "outliers by sensitivity to the power" in said, err
    assert not [p.name for p in (tmp_path / "out.requant").iterdir() if p.is_dir()]  # trials are gone
    lines = (tmp_path / "out.job" / "journal.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["stage"] == "repair"
    assert run("verify", out, "--job", tmp_path / "out.job")[0] == 0
    before = (out / "qkit.json").read_bytes()
    assert run(*command, "--outliers", 1, "--significant", 0.5)[0] == 0
    assert (out / "qkit.json").read_bytes() == before


def test_requant_that_cannot_be(run, tiny, small, tmp_path):
    base = ("quantize", "--model", tiny("llama"), "--scheme", "w3a16", "--out", tmp_path / "out", *small)
    for more, words in (
        (("--method", "requant+awq", "--significant", 0), "without significant weights"),
        (("--method", "requant", "--significant", 0, "--outliers", 0), "neither"),
        (("--method", "requant", "--outliers", 50), "outliers"),
    ):
        code, _, err = run(*base, *more)
        assert code == 2 and words in err, err
    assert not (tmp_path / "out").exists()


def test_search_goes_on_after_a_stop(tiny, calib, tmp_path):
    """What was measured is not measured again; the result is the same as without the stop."""
    from qkit.errors import Stopped

    class Stop(Quiet):
        left = 60

        def step(self, amount: int = 1) -> None:
            self.left -= 1
            if not self.left:
                raise Stopped("now")

    request = asked(tiny("llama"), calib, "w2a16", "requant+gptq", group_size=32)
    whole = search_outliers(request, tmp_path / "a", tmp_path / "a.job", Quiet())
    with pytest.raises(Stopped):
        search_outliers(request, tmp_path / "b", tmp_path / "b.job", Stop())
    again = search_outliers(request, tmp_path / "b", tmp_path / "b.job", Quiet())
    assert again == whole and whole.divergence[whole.exponent] == min(whole.divergence.values())
    assert whole.divergence[whole.exponent] <= whole.divergence[0.0]
