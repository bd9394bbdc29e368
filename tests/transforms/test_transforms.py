"""Transforms leave the function of a model as it is: with every weight rewritten and none quantized, the logits agree."""

import json

import pytest
import torch
import transformers
from safetensors import safe_open
from tiny_models import logits, relative, tokens

from qkit.calibration.statistics import Stats
from qkit.engine.job import Job
from qkit.engine.run import run_blocks
from qkit.errors import Unsupported
from qkit.families.materialize import load_block, release
from qkit.runtime.loading import load
from qkit.system.parallel import workers
from qkit.tensor.formats import SCHEMES, Scheme, fit_group
from qkit.tensor.qtensor import dequantize, find_params
from qkit.tensor.qtensor import quantize as to_codes
from qkit.transforms.rotate import orthogonal, rotated_parameters
from qkit.transforms.scales import awq_candidates, search, smoothquant_candidates, squared_error
from qkit.transforms.state import BlockState
from qkit.transforms.table import TRANSFORMS
from qkit.workflows.quantize import Request, open_structure, prepare, quantize

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "opt", "gpt_neox", "mixtral", "qwen3_moe"]
BIASED = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}


def reference(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def inputs_of(model, structure, x) -> dict[str, torch.Tensor]:
    """{group key: what its linears read, [tokens, in]} of every group that is no expert, in a plain run of the model."""
    seen, handles = {}, []
    for block in structure.blocks:
        for group in block.groups:
            if group.expert is None:
                module = model.get_submodule(f"{block.path}.{group.hook}")
                note = lambda _, args, key=group.key: seen.__setitem__(key, args[0].detach().flatten(0, -2))  # noqa: E731
                handles.append(module.register_forward_pre_hook(note))
    logits(model, x)
    for handle in handles:
        handle.remove()
    return seen


def stats_of(x: torch.Tensor) -> Stats:
    return Stats(
        tokens=len(x), mean_square=x.square().mean(0), sample=x, absmax=x.abs().amax(0), mean_abs=x.abs().mean(0)
    )


def scheme_for(name: str, columns: int) -> Scheme:
    s = SCHEMES[name]
    return Scheme(name, fit_group(s.weights, columns), s.activations)


def transformed(folder, name: str, scheme: str = "W3A16"):
    """The model with ``name`` applied to every block (and around them), and how many weights it changed."""
    model, structure = reference(folder), open_structure(str(folder))
    _ = structure.stream  # seen while no block has weights
    seen = inputs_of(model, structure, tokens(4))
    changed = 0
    with torch.no_grad():
        for block in structure.blocks:
            state = BlockState(structure=structure, block=block, module=load_block(structure, block, structure.dtype))
            state.stats = {key: stats_of(seen[key]) for g in block.groups if (key := g.key) in seen}
            TRANSFORMS[name].apply(state, {x.name: scheme_for(scheme, x.shape[1]) for x in block.linears}, 0)
            state.write_back()
            changed += len(state.changed)
            model.get_submodule(block.path).load_state_dict(state.module.state_dict())
            release(state.module)
        if name == "rotate":
            for parameter, value in rotated_parameters(structure, 0).items():
                model.get_submodule(parameter.rpartition(".")[0]).weight = torch.nn.Parameter(value)
    return model, changed


def assert_same_function(folder, name: str, scheme: str = "W3A16"):
    model, changed = transformed(folder, name, scheme)
    assert changed
    x = tokens(3, seed=4)
    error = relative(logits(model, x), logits(reference(folder), x))
    assert error < 1e-5


@pytest.mark.parametrize("name", ["smoothquant", "awq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scales_preserve_the_function(family, name, tiny):
    assert_same_function(tiny(family, torch.float32), name, "W8A8" if name == "smoothquant" else "W3A16")


@pytest.mark.parametrize("name", ["smoothquant", "awq", "rotate"])
def test_biases_everywhere(name, tiny):
    assert_same_function(tiny("llama", torch.float32, **BIASED), name)


@pytest.mark.parametrize("name", ["smoothquant", "awq"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"num_key_value_heads": 4, "head_dim": 8}),
        ("opt", {"do_layer_norm_before": False}),
        ("opt", {"word_embed_proj_dim": 32}),
        ("opt", {"activation_function": "gelu"}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gpt_neox", {"attention_bias": False}),
        ("qwen3_moe", {"mlp_only_layers": [0]}),
    ],
    ids=str,
)
def test_variants_of_a_family(family, changes, name, tiny):
    """The config decides what feeds a linear (post-norm OPT) and whether a scale passes an activation (GELU)."""
    folder = tiny(family, torch.float32, **changes)
    assert_same_function(folder, name)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", TIED),
        ("mistral", {}),
        ("qwen2", TIED),
        ("qwen3", {}),
        ("llama", {"hidden_size": 96}),
        ("phi3", {}),
        ("mixtral", {}),
        ("qwen3_moe", {"mlp_only_layers": [0]}),
    ],
    ids=str,
)
def test_rotation_preserves_the_function(family, changes, tiny):
    assert_same_function(tiny(family, torch.float32, **changes), "rotate")


@pytest.mark.parametrize("n", [1, 2, 3, 64, 80, 96, 576])
def test_rotations_are_orthogonal(n):
    q = orthogonal(n, 0)
    assert q.dtype == torch.float32
    assert float((q.double().T @ q.double() - torch.eye(n)).abs().max()) < 1e-6
    assert torch.equal(q, orthogonal(n, 0))
    assert n < 3 or not torch.equal(q, orthogonal(n, 1))
    # A single outlier is spread over all channels.
    assert n < 64 or float(q.abs().max()) < 8 / n**0.5


@pytest.mark.parametrize(
    ("family", "why"),
    [
        (
            "gemma3",
            "something is added to the residual stream that no linear layer writes: what leaves a norm behind a layer",
        ),
        ("opt", "something is added to the residual stream that no linear layer writes"),
        (
            "gpt_neox",
            "gpt_neox.layers.0.input_layernorm is no RMSNorm: it does more than divide by the root mean square",
        ),
    ],
)
def test_rotation_is_refused_where_it_changes_the_function(family, why, tiny):
    with pytest.raises(Unsupported, match=rf"method rotate needs .*; in {family}, {why}.*: use"):
        prepare(Request(model=str(tiny(family)), scheme="w8a16", method="rotate"))


def test_rotated_tied_model_comes_out_untied(tiny, tmp_path, quiet):
    folder = tiny("llama", torch.float32, **TIED)
    with safe_open(folder / "model.safetensors", "pt") as f:
        assert "lm_head.weight" not in f.keys()
    request = Request(model=str(folder), scheme="w8a16", method="rotate", group_size=32)
    found = prepare(request)
    assert found.plan.untied
    report = quantize(request, tmp_path / "out", quiet, prepared=found)
    assert report.ok
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as f:
        embedding, head = (f.get_tensor(n) for n in ("model.embed_tokens.weight", "lm_head.weight"))
    assert not torch.equal(embedding, head)
    x = tokens(3)
    assert relative(logits(load(tmp_path / "out"), x), logits(reference(folder), x)) < 0.05  # what 8 bits cost


def test_a_search_never_makes_its_own_measure_worse():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 64, generator=g) * torch.exp(1.5 * torch.randn(64, generator=g))
    weights, stats = [torch.randn(32, 64, generator=g)], stats_of(x)
    for name, make in (("W8A8", smoothquant_candidates), ("W4A8", awq_candidates), ("W3A16", awq_candidates)):
        scheme = scheme_for(name, 64)
        losses = []

        def loss(outputs, references, into=losses):
            into.append(squared_error(outputs, references))
            return into[-1]

        candidates = make(weights, stats)
        best = search(weights, stats, scheme, candidates, torch.bfloat16, loss)
        tried = [torch.ones(64), *candidates]
        assert len(losses) == len(tried)
        assert torch.equal(best, tried[losses.index(min(losses))])
        assert min(losses) < losses[0]
        assert all(bool((s.isfinite() & (s > 0)).all()) for s in tried)


def test_candidates_are_the_papers():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(300, 16, generator=g) * torch.arange(1, 17), torch.randn(8, 16, generator=g)
    stats = stats_of(x)
    half = x.abs().amax(0).sqrt() / w.abs().amax(0).sqrt()  # SmoothQuant with a = 1/2
    near = min(smoothquant_candidates([w], stats), key=lambda s: float((s / s.mean() - half / half.mean()).abs().max()))
    assert torch.allclose(near / near.mean(), half / half.mean(), rtol=1e-5)
    root = x.abs().mean(0).sqrt()
    root = root / (root.max() * root.min()).sqrt()
    assert any(torch.allclose(s, root, rtol=1e-5) for s in awq_candidates([w], stats))


def test_channels_that_are_never_active_stay_as_they_are():
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 0
    for make in (smoothquant_candidates, awq_candidates):
        for s in make([torch.ones(4, 16)], stats_of(x)):
            assert float(s[3]) == 1.0 and bool(s.isfinite().all())


def test_smoothing_moves_outliers_out_of_the_activations():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(400, 64, generator=g), torch.randn(64, 64, generator=g)
    x[:, 5] *= 60
    scheme, stats = SCHEMES["W8A8"], stats_of(x)
    s = search([w], stats, scheme, smoothquant_candidates([w], stats), torch.float32, squared_error)

    def error(scale: torch.Tensor) -> float:
        from qkit.tensor.activations import quantize_activations

        v = w * scale
        back = dequantize(to_codes(v, find_params(v, scheme.weights, torch.float32), scheme.weights))
        return relative(quantize_activations(x / scale, scheme.activations) @ back.T, x @ w.T)

    assert error(s) < 0.4 * error(torch.ones(64))


@pytest.mark.parametrize("method", ["awq", "smoothquant", "rotate"])
def test_rounding_after_a_transform_searches_its_scales(method, tiny, calib, quiet, tmp_path):
    """The rewritten weights get searched scales, not their full range: by the energy of the inputs where rows were run."""
    given = {"calib": calib, "samples": 8, "seqlen": 32, "threads": 1, "significant": 0.1}
    found = prepare(Request(model=str(tiny("llama")), scheme="w3a16", method=method, group_size=32, **given))
    block, searched, groups = found.structure.blocks[1], 0, 0
    with Job.open(tmp_path / "job", found.plan.identity) as job, workers(1) as pool:
        run_blocks(found.plan, found.structure, job, pool, quiet)
        part = job.part(1)
        for linear in block.linears:
            q, _ = job.quantized(1, linear.name, found.plan.linears[linear.name].weights)
            original = part.get(f"{linear.name}:original")
            if original is None:
                continue
            full = find_params(job.read(original).float(), q.format, torch.bfloat16).scale
            searched += int(((q.params.scale / full) < 0.97).sum())
            groups += full.numel()
    assert groups and searched > 0.3 * groups
