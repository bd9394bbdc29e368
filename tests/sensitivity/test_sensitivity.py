"""Sensitivity on the embedded trained model: the path integral against the true loss change, and what a profile holds."""

import json
from dataclasses import replace

import pytest
import qkit_data
import torch

from qkit.calibration.mixture import Layout, mixed_rows
from qkit.calibration.sources import CalibSource
from qkit.errors import BadInput, Unsupported
from qkit.files import offload
from qkit.runtime import loading
from qkit.runtime.loading import load_tokenizer
from qkit.sensitivity import measures, reference_model
from qkit.sensitivity.decomposition import decompose, decomposition_file
from qkit.sensitivity.measures import input_terms
from qkit.sensitivity.outputs import OutputSample, next_norms
from qkit.sensitivity.pqi import mean_gradients, weight_shares
from qkit.sensitivity.profile import Profile
from qkit.sensitivity.reference_model import ReferenceModel, Replacement
from qkit.sensitivity.units import units_of
from qkit.system.parallel import workers
from qkit.tensor.formats import ACTIVATION_FORMATS, FORMATS
from qkit.tensor.qtensor import dequantize, find_params, quantize
from qkit.workflows.profile import ProfileRequest, forecast, profile
from qkit.workflows.quantize import Request, open_structure


@pytest.fixture(scope="module")
def reference():
    structure = open_structure("tiny-llama")
    model = loading.load("tiny-llama", dtype=torch.float32)
    with workers(2) as pool:
        yield ReferenceModel(model, structure, pool)


@pytest.fixture(scope="module")
def rows(reference):
    path = qkit_data.text_path("calibration")
    return mixed_rows([CalibSource(str(path))], load_tokenizer("tiny-llama"), Layout(samples=8, seqlen=64), 4096).tokens


def rounded(reference, bits: int) -> dict[str, torch.Tensor]:
    fmt = FORMATS[f"int{bits}"].with_group(64)
    found = {}
    for name in reference.where:
        w = reference.weight(name)
        found[name] = dequantize(quantize(w, find_params(w, fmt, torch.bfloat16, search=True), fmt))
    return found


def true_change(reference, targets, rows) -> float:
    before = reference.loss(rows)
    with reference.replaced({n: Replacement(w) for n, w in targets.items()}):
        return reference.loss(rows) - before


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_integral_is_the_loss_change(reference, rows, bits):
    """Where the gradient and the diagonal Fisher matrix at the starting point are far off."""
    targets = rounded(reference, bits)
    start = {n: reference.weight(n).clone() for n in targets}
    true = true_change(reference, targets, rows)
    gbar = mean_gradients(reference, targets, rows, 8)
    parts = {n: weight_shares(start[n], targets[n], gbar[n]) for n in targets}
    predicted = sum(float(s.double().sum()) for s in parts.values())
    assert true > 0
    assert predicted == pytest.approx(true, rel=0.02)
    _, g = reference.gradients(rows, list(targets))
    first = sum(float((g[n] * (targets[n] - start[n])).double().sum()) for n in targets)
    assert abs(first - true) > 0.5 * true
    _, fisher = reference.gradients(rows, list(targets), squares=True)
    second = 0.5 * sum(float((fisher[n] * (targets[n] - start[n]).square()).double().sum()) for n in targets)
    assert second < true / 10


def test_the_error_of_the_rule(reference, rows):
    """Midpoints: a quarter per doubling of the points; right ends: a half."""
    targets = rounded(reference, 2)
    start = {n: reference.weight(n).clone() for n in targets}
    true = true_change(reference, targets, rows)

    def error(points: int, rule: str) -> float:
        gbar = mean_gradients(reference, targets, rows, points, rule)
        return abs(sum(float(weight_shares(start[n], targets[n], gbar[n]).double().sum()) for n in targets) - true)

    assert 2.8 < error(2, "midpoint") / error(4, "midpoint") < 5.5
    assert 1.6 < error(2, "right") / error(4, "right") < 2.5


def test_what_is_replaced_comes_back(reference, rows):
    before = {n: reference.weight(n).clone() for n in reference.where}
    name = next(iter(before))
    with pytest.raises(ZeroDivisionError), reference.replaced({name: Replacement(torch.zeros_like(before[name]))}):
        assert not reference.weight(name).any()
        _ = 1 / 0
    assert all(torch.equal(reference.weight(n), w) for n, w in before.items())
    unmoved = mean_gradients(reference, {name: before[name]}, rows[:1], 1)
    assert float((unmoved[name] * (before[name] - before[name])).abs().sum()) == 0


def test_gradients_are_those_of_autograd(reference, rows):
    name = next(iter(reference.where))
    loss, found = reference.gradients(rows, [name])
    parameter = reference.weight(name)
    model = reference.model
    with torch.inference_mode(False), torch.enable_grad():
        leaf = model.get_parameter(f"{name}.weight").requires_grad_(True)
        out = model(input_ids=rows, labels=rows, use_cache=False).loss
        (wanted,) = torch.autograd.grad(out, leaf)
        leaf.requires_grad_(False)
    assert loss == pytest.approx(float(out), rel=1e-5)
    assert parameter.shape == wanted.shape
    assert float((found[name] - wanted).norm() / wanted.norm()) < 1e-4


# ---- inputs and outputs ---------------------------------------------------------------------------------------


@pytest.fixture
def small_reference(tiny):
    """A tiny random Llama of two blocks that a test may change."""
    path = str(tiny("llama"))
    with workers(2) as pool:
        yield ReferenceModel(loading.load(path, dtype=torch.float32), open_structure(path), pool)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(5, 4096, (48, 32), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("activations", ["int8_token", "mxfp4_dynamic"])
def test_first_order_of_inputs_is_the_derivative(small_reference, ids, activations):
    """Against a central difference: every linear but one block's attention reads x + t (x~ - x), t small."""
    reference, fmt, ids = small_reference, ACTIVATION_FORMATS[activations], ids[:32]
    names = [n for n in reference.where if "layers.0.self_attn" not in n]

    def terms(seen):
        return sum(float(input_terms(x, g, (fmt, None)).double().sum()) for x, g in seen.values())

    found = sum(reference.with_inputs(ids, names, terms))
    seen = reference.sample_inputs(ids, names, ids.numel())
    change = {n: (measures.quantize_activations(x, fmt) - x).view(*ids.shape, -1) for n, x in seen.items()}

    def loss(t: float) -> float:
        modules = [(n, reference.model.get_submodule(n)) for n in names]
        handles = [m.register_forward_pre_hook(lambda _, args, n=n: (args[0] + t * change[n],)) for n, m in modules]
        value = reference.loss(ids)
        for handle in handles:
            handle.remove()
        return value

    assert abs(found) > 1e-5
    assert found == pytest.approx((loss(0.03) - loss(-0.03)) / 0.06, rel=0.01)


def test_inputs_do_not_depend_on_workers(tiny, ids):
    path = str(tiny("llama"))
    found = []
    for count in (1, 2):
        with workers(count) as pool:
            reference = ReferenceModel(loading.load(path, dtype=torch.float32), open_structure(path), pool)
            names = list(reference.where)
            found.append(list(reference.with_inputs(ids, names, lambda seen: {n: g for n, (_, g) in seen.items()})))
            found[-1].append(reference.sample_inputs(ids, names, 100))
    assert len(found[0]) == 3
    assert all(torch.equal(a[n], b[n]) for a, b in zip(*found, strict=True) for n in a)
    assert all(len(x) == 100 for x in found[0][-1].values())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3", "opt", "gpt_neox", "mixtral", "qwen3_moe"])
def test_gradients_of_inputs_and_of_weights_agree(tiny, family):
    """g_x . x = g_w . w for every linear, in a float32 checkpoint of every family: both are g_y . (y - b)."""
    path = str(tiny(family, torch.float32))
    ids = torch.randint(5, 4096, (6, 32), generator=torch.Generator().manual_seed(3))
    with workers(1) as pool:
        reference = ReferenceModel(loading.load(path, dtype=torch.float32), open_structure(path), pool)
        names = [n for n, (_, x) in reference.where.items() if x.expert is None]
        (seen,) = reference.with_inputs(ids, names, lambda seen: {n: (x * g).double() for n, (x, g) in seen.items()})
        _, g = reference.gradients(ids, names)
    for n in names:
        size = float(seen[n].abs().sum())
        assert float(seen[n].sum()) == pytest.approx(
            float((g[n] * reference.weight(n)).double().sum()), abs=1e-5 * size
        )
        assert size > 0


def test_sampled_tokens_are_spread(small_reference, ids):
    path = "model.layers.1.mlp"
    whole = small_reference.sample_inputs(ids, [path], ids.numel())[path]
    some = small_reference.sample_inputs(ids, [path], 7)[path]
    assert torch.equal(some, whole[[i * ids.numel() // 7 for i in range(7)]])


def test_the_norm_that_reads_next(small_reference, tiny):
    norms = next_norms(small_reference.structure)
    assert norms == {
        "model.layers.0.self_attn.o_proj": "model.layers.0.post_attention_layernorm",
        "model.layers.0.mlp.down_proj": "model.layers.1.input_layernorm",
        "model.layers.1.self_attn.o_proj": "model.layers.1.post_attention_layernorm",
        "model.layers.1.mlp.down_proj": "model.norm",
    }
    assert next_norms(open_structure(str(tiny("opt")))) == {}


def output_reference(reference, ids, name, norm, weight) -> float:
    """By hand, in float64: error of the output times the gains, relative to what the norm reads times the gains."""
    seen = {}
    model = reference.model
    keep = [(name, model.get_submodule(name)), (norm, model.get_submodule(norm))]
    handles = [m.register_forward_pre_hook(lambda _, args, n=n: seen.update({n: args[0].double()})) for n, m in keep]
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    gain = model.get_submodule(norm).weight.double()
    error = seen[name] @ (weight - reference.weight(name)).double().T * gain
    return float((error**2).sum() / ((seen[norm] * gain) ** 2).sum())


@pytest.mark.parametrize("which", ["layers.0.self_attn.o_proj", "layers.0.mlp.down_proj", "layers.1.mlp.down_proj"])
def test_output_error_before_the_next_norm(small_reference, ids, which):
    reference = small_reference
    unit = next(u for u in units_of(reference.structure) if u.key.endswith(which))
    name, norm = unit.key, next_norms(reference.structure)[unit.key]
    gain = reference.model.get_submodule(norm).weight.data
    moved = Replacement(rough(reference, name))
    found = []
    for value in (1.0, 2.0, None):  # None: one channel alone counts twice
        gain.fill_(value or 1.0)
        if value is None:
            gain[5] = 2.0
        sample = OutputSample(reference, [unit], ids, ids.numel())
        found.append(sample.error(unit, {name: moved}))
        assert found[-1] == pytest.approx(output_reference(reference, ids, name, norm, moved.weight), rel=1e-4)
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[2] != pytest.approx(found[0], rel=1e-4)


def rough(reference, name):
    """The weight in steps of a quarter of its spread."""
    w = reference.weight(name)
    return torch.round(w / (w.std() / 4)) * (w.std() / 4)


def test_output_error_of_what_does_not_write(small_reference, ids):
    reference = small_reference
    unit = units_of(reference.structure)[0]
    assert len(unit.linears) == 3
    found = {x.name: Replacement(rough(reference, x.name)) for x in unit.linears}
    x = reference.sample_inputs(ids, [unit.linears[0].name], 512)[unit.linears[0].name].double()
    ratios = []
    for name, r in found.items():
        w = reference.weight(name).double()
        ratios.append(float((x @ (r.weight - w).T).square().sum() / (x @ w.T).square().sum()))
    sample = OutputSample(reference, [unit], ids)
    assert sample.error(unit, found) == pytest.approx(sum(ratios) / 3, rel=1e-4)
    unmoved = {n: Replacement(reference.weight(n).clone()) for n in found}
    assert sample.error(unit, unmoved) == 0
    fmt = ACTIVATION_FORMATS["int8_token"]
    assert 0 < sample.error(unit, {n: Replacement(r.weight, fmt) for n, r in unmoved.items()}) < 1e-3


# ---- the decomposition ----------------------------------------------------------------------------------------


def test_decomposition_of_a_linear():
    s = torch.zeros(40, 50)
    assert all(not t.any() for k, t in decompose(s).items() if k != "top_index")
    s = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    s[30, 7], s[2, 3] = -9.0, 9.0
    parts = decompose(s)
    assert parts["top_index"].tolist() == [2 * 50 + 3, 30 * 50 + 7] and parts["top_value"].tolist() == [9.0, -9.0]
    assert torch.allclose(parts["rows"], s.sum(1)) and torch.allclose(parts["columns"], s.sum(0))
    size = s.abs().flatten().sort(descending=True).values
    wanted = [float(size[:n].sum() / size.sum()) for n in (2, 10, 20, 100)]
    assert parts["coverage"].tolist() == pytest.approx(wanted, rel=1e-5)
    assert [str(t.dtype) for t in parts.values()] == ["torch.float32"] * 3 + ["torch.int64", "torch.float32"]
    equal = decompose(torch.full((3, 1000), -2.0))
    assert equal["top_index"].tolist() == [0, 1, 2] and float(equal["coverage"][3]) == pytest.approx(0.05)


@pytest.fixture
def request_of(tiny, calib):
    def get(of="llama", candidates="int4,w8a8,nvfp4,bf16", wanted=("pqi",), rows=4, **changes) -> ProfileRequest:
        base = Request(model=str(tiny(of)), group_size=32, method="rtn", calib=calib, samples=8, seqlen=32, threads=1)
        return ProfileRequest(base, candidates, wanted, rows, **{"points": 2, **changes})

    return get


def test_measures_of_inputs_and_outputs(request_of, tmp_path, quiet):
    made = profile(request_of(wanted=("output_norm", "first_x", "kl")), tmp_path, quiet)
    for u in made.units:
        costs = {n: c.costs for n, c in u.choices.items()}
        assert costs["W4A16"]["first_x"] == costs["keep"]["first_x"] == 0
        assert 0 < costs["W8A8"]["first_x"] < costs["NVFP4"]["first_x"]
        assert 0 == costs["keep"]["output_norm"] < costs["W8A8"]["output_norm"] < costs["NVFP4"]["output_norm"]


def test_experts_have_no_inputs(request_of, tmp_path, quiet):
    made = profile(request_of("mixtral", "w8a8", ("output", "output_norm", "first_x")), tmp_path, quiet)
    kinds = {"experts" in u.key: u.choices["W8A8"].costs for u in made.units}
    assert kinds[True]["first_x"] == 0 < kinds[False]["first_x"]
    assert kinds[True]["output_norm"] == kinds[True]["output"] > 0


def test_decomposition_is_kept_beside_the_profile(request_of, tmp_path, quiet):
    made = profile(request_of(), tmp_path, quiet)
    for name in ("W4A16", "W8A8", "NVFP4"):
        found = Profile.decomposition(tmp_path, name)
        for u in made.units:
            cost = u.choices[name].costs["pqi"]
            for part in ("rows", "columns"):
                values = torch.cat([found[f"{name}:{n}:{part}"] for n in u.linears]).double()
                assert float(values.sum()) == pytest.approx(cost, rel=1e-4, abs=1e-6 * float(values.abs().sum()))
            for n in u.linears:
                coverage = found[f"{name}:{n}:coverage"]
                assert (coverage.diff() > 0).all() and 0 < coverage[0] and coverage[-1] <= 1
                size = found[f"{name}:{n}:top_value"].abs()
                assert len(size) == len(found[f"{name}:{n}:top_index"]) and (size.diff() <= 0).all()
    with pytest.raises(BadInput, match="run 'qkit profile' of this folder again"):
        Profile.decomposition(tmp_path, "keep")
    file = decomposition_file(tmp_path, "W4A16")
    file.write_bytes(decomposition_file(tmp_path, "W8A8").read_bytes())
    with pytest.raises(BadInput, match=r"not the decomposition of profile\.json"):
        Profile.decomposition(tmp_path, "W4A16")


def test_a_lost_decomposition_is_made_again(request_of, tmp_path, quiet, monkeypatch):
    first = profile(request_of(), tmp_path, quiet)
    file = decomposition_file(tmp_path, "W8A8")
    content = file.read_bytes()
    file.unlink()
    integrated, original = [], measures._integrate

    def counted(bench, candidate):
        integrated.append(candidate.name)
        return original(bench, candidate)

    monkeypatch.setattr(measures, "_integrate", counted)
    assert profile(request_of(), tmp_path, quiet) == first
    assert integrated == ["W8A8"] and file.read_bytes() == content


# ---- memory ---------------------------------------------------------------------------------------------------


def test_reference_on_disk_gives_the_same(request_of, tmp_path, quiet, monkeypatch):
    wanted = ("kl", "loss")
    in_memory = profile(request_of(wanted=wanted, rows=8), tmp_path / "a", quiet)
    used = []
    monkeypatch.setattr(reference_model, "SPILL_BYTES", 1000)
    append = offload.OffloadedTensors.append
    monkeypatch.setattr(offload.OffloadedTensors, "append", lambda self, t: (used.append(t.shape), append(self, t))[1])
    on_disk = profile(request_of(wanted=wanted, rows=8), tmp_path / "b", quiet)
    assert on_disk == in_memory and used == [(8, 31, 4096)]
    assert {p.name for p in (tmp_path / "b").iterdir()} == {p.name for p in (tmp_path / "a").iterdir()}


def test_spilled_tensors_come_back(tmp_path):
    kept = offload.OffloadedTensors(tmp_path)
    tensors = [torch.randn(3, 5), torch.arange(7), torch.randn(2, 6).T]
    for t in tensors:
        kept.append(t)
    assert len(kept) == 3 and all(torch.equal(kept[i], t) for i, t in enumerate(tensors))
    assert not list(tmp_path.iterdir())


def test_forecast_counts_passes(request_of):
    everything = ("weight", "output", "output_norm", "first", "first_x", "fisher", "pqi", "loss", "kl")
    found = forecast(request_of(wanted=everything))
    units, candidates, points = 8, 3, 2
    assert found.solver_runs == candidates and (found.rows, found.length) == (4, 32)
    assert found.forward == 2 + candidates + units * candidates + 1
    assert found.backward == 3 + candidates * points
    assert found.memory["reference probabilities"] == 4 * 31 * 4096 * 4
    less = forecast(request_of(candidates="int4,bf16", wanted=("weight", "first_x")))
    assert (less.solver_runs, less.forward, less.backward) == (1, 3, 0)
    assert less.peak_memory <= found.peak_memory and less.memory["measures"] < found.memory["measures"]
    few = request_of(wanted=("kl",))
    many = forecast(replace(few, rows=4000, base=replace(few.base, samples=4000)))
    assert (
        many.spilled["reference probabilities"] == 4000 * 31 * 4096 * 4 and many.memory["reference probabilities"] == 0
    )
    assert "of disk" in many.line() and len(found.line().splitlines()) == 1


def test_a_profile_that_does_not_fit_is_refused(request_of, tmp_path, quiet, monkeypatch):
    monkeypatch.setattr("qkit.sensitivity.forecast.available_memory", lambda: 20_000_000)
    with pytest.raises(
        Unsupported, match=r"needs about .* [GM]B of memory and 20\.00 MB are available: use fewer --rows"
    ):
        profile(request_of(), tmp_path / "p", quiet)
    assert not (tmp_path / "p").exists()


def test_the_command_tells_what_it_will_take(run, tiny, tmp_path, small):
    common = ("--candidates", "int4,bf16", "--group-size", 32, "--method", "rtn", "--rows", 4, "--measures", "weight")
    data = tmp_path / "p.json"
    code, out, err = run("profile", "--model", tiny("llama"), *common, *small, "--out", tmp_path / "p", "--json", data)
    assert code == 0, err
    assert "forecast: 1 solver runs, 3 forward and 0 forward and backward passes over 128 tokens" in out
    assert json.loads(data.read_text())["units"] == 8
