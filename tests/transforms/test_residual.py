"""Residual channels: inputs quantized twice where four bits serve them badly, as a product of plain blocks."""

import json
import shutil

import pytest
import qkit_data
import tiny_models
import torch
import transformers
from conftest import Quiet
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_dits import make_pipeline

import qkit
from qkit.errors import QkitError
from qkit.files.safefile import read_header
from qkit.nn import ops
from qkit.nn.layers import QuantLinear
from qkit.tensor.activations import in_groups, quantize_activations, static_scale
from qkit.tensor.formats import FORMATS, scheme
from qkit.tensor.input_transform import InputTransform, hadamard, hadamard_matrix
from qkit.tensor.qtensor import E2M1, Params, QTensor, dequantize, find_params
from qkit.tensor.qtensor import quantize as to_codes
from qkit.transforms.residual import residual_channels
from qkit.verification.verify import verify
from qkit.workflows.quantize import Request, prepare, quantize

NVFP4 = FORMATS["nvfp4"]


def nvfp4_group(x: torch.Tensor, shared: float) -> torch.Tensor:
    """One group of 16 by the definition: both scales tried, float64; of equal ones the larger grid."""
    grid = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float64)
    found = []
    for ceiling in (6.0, 4.0):
        scale = (x.abs().max().float() * (6.0 / ceiling) / 6.0 * shared).clamp(max=448.0).to(torch.float8_e4m3fn)
        step = max(float(scale), 0.125 if float(scale) == 0 else 0) / shared
        distance = (x.double()[:, None] / step - grid).abs()
        found.append(grid[distance.argmin(1)] * step)
    errors = [float((f - x.double()).square().sum()) for f in found]
    return found[1] if errors[1] < errors[0] else found[0]


def outlier_inputs(columns: int = 256) -> torch.Tensor:
    """[512, columns] with 24 channels 8 to 40 times the others, in random places."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(512, columns, generator=g)
    where = torch.randperm(columns, generator=g)[:24]
    x[:, where] *= torch.linspace(8, 40, 24)
    return x


def largest_first(x: torch.Tensor, count: int) -> InputTransform:
    chosen = x.abs().amax(0).argsort(descending=True)[:count]
    return InputTransform.of(None, 0, chosen.to(torch.int32), x.shape[1])


def twice(x: torch.Tensor, count: int) -> torch.Tensor:
    """x as it is seen with so many residual channels."""
    static = torch.tensor([static_scale(float(x.abs().max()), NVFP4)])
    if not count:
        return quantize_activations(x, NVFP4, static)
    inputs = largest_first(x, count)
    return inputs.back(quantize_activations(inputs(x), NVFP4, static, inputs.residual))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.01, 1.0, 300.0]))
def test_groups_take_the_better_of_two_scales(seed, size):
    x = torch.randn(1, 48, generator=torch.Generator().manual_seed(seed)) * size
    x[0, 20] *= 10
    shared = static_scale(float(x.abs().max()), NVFP4)
    found = quantize_activations(x, NVFP4, torch.tensor([shared]), 16)
    once = torch.cat([nvfp4_group(g, shared) for g in x[0].split(16)])
    again = nvfp4_group((x[0, :16].double() - once[:16]).float(), shared)
    expected = once + torch.cat([again, torch.zeros(32, dtype=torch.float64)])
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-6 * size)


def test_four_over_six():
    """10, 20, 30, 40 lie on the grid with their largest at 4, and not with it at 6 (arXiv 2512.02010, section 3)."""
    x = torch.tensor([[10.0, 20.0, 30.0, 40.0] * 8])
    static = torch.tensor([1.0])
    assert (quantize_activations(x, NVFP4, static) - x).abs().max() > 2
    both = quantize_activations(x, NVFP4, static, 16)
    assert torch.equal(both, x)


@pytest.mark.parametrize("count", [16, 64, 256])
def test_it_is_one_product_of_plain_blocks(count):
    """[Q(x) | Q(r)] times [W | its first columns], whose codes and scales are copies, is what the layer computes."""
    x, w = outlier_inputs(), torch.randn(32, 256, generator=torch.Generator().manual_seed(1))
    inputs, static = largest_first(x, count), torch.tensor([static_scale(float(x.abs().max()), NVFP4)])
    turned, weight = inputs(x), inputs.weight(w)
    q = to_codes(weight, find_params(weight, NVFP4, torch.float32), NVFP4)
    once = in_groups(turned, NVFP4, static, two_scales=True)
    again = in_groups((turned - once)[:, :count], NVFP4, static, two_scales=True)
    scale = torch.cat([q.params.scale.float(), q.params.scale[:, : count // 16].float()], 1)
    params = Params(scale.to(torch.float8_e4m3fn), None, q.params.global_scale)
    wide = QTensor(torch.cat([q.codes, q.codes[:, :count]], 1), params, NVFP4)
    plain = torch.cat([once, again], 1) @ dequantize(wide).T
    found = ops.linear(turned, ops.prepare(q, NVFP4, torch.float32), None, NVFP4, static, count)
    assert tiny_models.relative(found, plain) < 1e-5


def test_order_is_a_permutation_and_its_weight_follows():
    inputs = InputTransform.of(None, 0, torch.tensor([40, 3, 17, *range(50, 63)], dtype=torch.int32), 64)
    x, w = torch.randn(5, 64), torch.randn(7, 64)
    assert sorted(inputs.order.tolist()) == list(range(64)) and inputs.order[:3].tolist() == [40, 3, 17]
    assert torch.equal(inputs.back(inputs(x)), x) and torch.equal(inputs.weight_back(inputs.weight(w)), w)
    torch.testing.assert_close(inputs(x) @ inputs.weight(w).T, x @ w.T)


def test_a_matrix_that_was_made_without_gradients_is_good_for_them():
    hadamard_matrix.cache_clear()  # as in a process that measures first and learns after
    with torch.inference_mode():
        plain = hadamard(torch.eye(32), 32)
    x = torch.eye(32, requires_grad=True)
    hadamard(x, 32).sum().backward()
    torch.testing.assert_close(x.grad, plain.sum(1).expand(32, 32))


def test_more_channels_err_less():
    """24 planted outliers: the error falls with the channels, most of it by as many as there are outliers, and never rises."""
    x = outlier_inputs()
    errors = [tiny_models.relative(twice(x, n), x) for n in (0, 16, 32, 64, 128, 256)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.08 and errors[2] < 0.3 * errors[0] and errors[-1] < 0.012


def test_how_many():
    """A number of whole groups, at least one; none where inputs have one scale for all channels."""
    counts = [residual_channels(NVFP4, 256, share) for share in (0.001, 0.25, 0.27, 1.0)]
    assert counts == [16, 64, 64, 256]
    assert residual_channels(scheme("w8a8").activations, 256, 0.5) == residual_channels(None, 256, 0.5) == 0


# ---- packed checkpoints ----------------------------------------------------------------------------------------


def asked(model, calib, method="residual+gptq", scheme="nvfp4", **more) -> Request:
    return Request(model=str(model), scheme=scheme, method=method, calib=calib, samples=8, seqlen=32, threads=1, **more)


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_packed_loaded_and_run(family, tiny, calib, tmp_path):
    """Written, proven and loaded, by qkit and by transformers; what comes out is the definition on the stored channels."""
    request, out = asked(tiny(family), calib, options={"share": 0.5}), tmp_path / "out"
    plan = prepare(request).plan
    assert plan.export == "qkit"
    assert quantize(request, out, Quiet()).ok
    header = read_header(out / "model.safetensors")
    assert sum(i.nbytes for i in header.values()) == pytest.approx(plan.packed_bytes, rel=0.005)
    stored = load_file(out / "model.safetensors")
    for name, p in plan.linears.items():
        channels = stored[f"{name}.input_residual"]
        assert len(channels) == p.residual > 0 and len(channels.unique()) == len(channels)
    ids = tiny_models.tokens()
    loaded = qkit.load(out, dtype=torch.float32)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    name = next(n for n in plan.linears if "experts" not in n)
    module = loaded.get_submodule(loaded_name(loaded, name))
    handle = module.register_forward_hook(lambda m, args, y: seen.update({name: (args[0], y)}))
    ours = tiny_models.logits(loaded, ids)
    handle.remove()
    x, y = seen[name]
    shared, channels = float(stored[f"{name}.input_global_scale"]), stored[f"{name}.input_residual"].long()
    order = [*channels.tolist(), *sorted(set(range(x.shape[-1])) - set(channels.tolist()))]
    row = x[0, 5, order]
    once = torch.cat([nvfp4_group(g, shared) for g in row.split(16)])
    left = (row.double() - once)[: len(channels)].float()
    once[: len(channels)] += torch.cat([nvfp4_group(g, shared) for g in left.split(16)])
    weight = dequantize(ops.unpacked(module.packed)).double()
    bias = 0 if module.bias is None else module.bias.double()
    torch.testing.assert_close((weight @ once + bias).float(), y[0, 5], rtol=1e-4, atol=1e-4)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    torch.testing.assert_close(tiny_models.logits(theirs, ids), ours, rtol=1e-4, atol=1e-4)


def loaded_name(model, stored: str) -> str:
    """The module that a checkpoint's linear became."""
    return next(n for n, _ in model.named_modules() if n.endswith(stored.removeprefix("model.")))


def test_towers_and_transformers_of_pictures(vlm, tmp_path):
    """Towers, which rows pass before the language model is looked at, and a diffusion transformer with precision by step."""
    path = vlm("llava", processor=True)
    towers = {"vision": "nvfp4", "projector": "nvfp4"}
    assert quantize(
        Request(model=str(path), scheme="nvfp4", method="residual+gptq", targets=towers, samples=8),
        tmp_path / "vlm",
        Quiet(),
    ).ok
    pipeline = make_pipeline(tmp_path / "wan", steps=3)
    assert quantize(
        Request(model=str(pipeline), scheme="6bit", method="residual+gptq", samples=8), tmp_path / "dit", Quiet()
    ).ok
    for model in (qkit.load(tmp_path / "vlm"), qkit.load(tmp_path / "dit").transformer):
        made = [m for m in model.modules() if isinstance(m, QuantLinear)]
        assert len(made) >= 20 and all(m.inputs.residual for m in made)


def test_it_brings_outputs_closer(tmp_path):
    """Of a trained model: at a quarter of the channels the loss changes by less than three quarters of what it did."""
    model = qkit_data.model_path(qkit_data.models()[0])
    tokens = prepare(
        Request(model=str(model), scheme="nvfp4", method="gptq", samples=12, seqlen=128)
    ).plan.calibration.tokens
    losses = []
    for method in (None, "gptq", "residual+gptq"):
        if method is not None:
            quantize(
                Request(model=str(model), scheme="nvfp4", method=method, samples=12, seqlen=128),
                tmp_path / method,
                Quiet(),
            )
        loaded = qkit.load(model if method is None else tmp_path / method, dtype=torch.float32)
        with torch.inference_mode():
            losses.append(float(loaded(input_ids=tokens, labels=tokens).loss))
    plain, less = losses[1] - losses[0], losses[2] - losses[0]
    assert plain > 0.01 and less < 0.75 * plain


def test_damage_is_found(tiny, calib, tmp_path):
    """A channel twice, one that is not there, a missing tensor, a record that says otherwise: each fails the proof."""
    out = tmp_path / "out"
    quantize(asked(tiny("llama"), calib), out, Quiet())
    name = "model.layers.0.self_attn.q_proj"

    def broken(change) -> str:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(out, copy)
        tensors, record = load_file(copy / "model.safetensors"), json.loads((copy / "qkit.json").read_text())
        change(tensors, record["linears"][name])
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
        (copy / "qkit.json").write_text(json.dumps(record))
        return " ".join(p.what for p in verify(copy).problems)

    key = f"{name}.input_residual"

    def first(value: int):
        return lambda tensors, record: tensors[key].__setitem__(0, value)

    assert "expected different channels of 64" in broken(first(64))
    assert "expected different channels of 64" in broken(lambda t, r: t[key].__setitem__(0, int(t[key][1])))
    assert "is missing" in broken(lambda t, r: t.pop(key))
    assert "belongs to no linear" in broken(lambda t, r: r.pop("residual"))
    assert "expected a number of groups" in broken(lambda t, r: r.update(residual=17))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scheme": "w8a8"}, "use scheme nvfp4"),
        ({"options": {"share": 0.0}}, "expected more than 0, to 1"),
        ({"options": {"share": 1.5}}, "expected more than 0, to 1"),
        ({"significant": 0.5}, "exclude each other"),
        ({"export": "compressed-tensors"}, "its loaders do not transform inputs"),
    ],
)
def test_what_cannot_be(tiny, calib, changes, words):
    with pytest.raises(QkitError, match=words):
        prepare(asked(tiny("llama"), calib, **changes))
