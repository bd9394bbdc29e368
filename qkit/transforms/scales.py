"""Per-channel scale searches: SmoothQuant, AWQ, and variants with other error weights.

Dividing the input x of a group of linears by s (per channel) and multiplying their weights by s changes nothing in
full precision; quantization errors move between activations and weights. Where the input comes from a norm or a linear,
1/s is folded into it and costs nothing at run time.

The core (``search``) takes candidate scales and a loss, quantizes the scaled weights (and the scaled activations, where the
scheme quantizes them), and keeps the candidate with the least loss; s = 1 is always a candidate, so a search never increases
its own loss.

 * SmoothQuant (Xiao et al., arXiv 2211.10438, eq. 4): s_j = max|x_j|^a / max|w_j|^(1-a), a searched per group. In a diffusion
   transformer max|x_j| is also taken of either half of the timesteps by itself, and their geometric mean is a second set of
   candidates: an outlier of some steps then counts half. (ViDiT-Q, arXiv 2406.02540, has scales, and a copy of the weights,
   for each range; one copy is ours.)
 * AWQ (Lin et al., arXiv 2306.00978, eq. 4-5): s_j = (mean|x_j|)^r, r in {0, 1/20 .. 19/20}, divided by
   sqrt(max s * min s). The loss is the squared error of the group's own outputs on sample tokens (the paper's code
   inspects the output of the attention or MLP module; measuring at the linears is our choice).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qkit.calibration.statistics import Stats
from qkit.families.blocks import LinearGroup, head_width
from qkit.families.norms import norm_offset
from qkit.tensor.activations import quantize_activations, static_scale
from qkit.tensor.formats import Scheme
from qkit.tensor.qtensor import dequantize, find_params, quantize, shared_amax
from qkit.transforms.state import BlockState

Loss = Callable[[list[Tensor], list[Tensor]], float]


def squared_error(outputs: list[Tensor], references: list[Tensor]) -> float:
    """Sum of squared differences; outputs, references: [tokens, out] per linear of the group."""
    return float(sum((o - r).square().sum().double() for o, r in zip(outputs, references, strict=True)))


def search(
    weights: list[Tensor],
    stats: Stats,
    scheme: Scheme,
    candidates: Iterable[Tensor],
    dtype: torch.dtype,
    loss: Loss,
    reference_inputs: Tensor | None = None,
) -> Tensor:
    """The candidate scale [in] with the least loss.

    weights: float32 [out_i, in] each; stats.sample: tokens on which outputs are compared
    reference_inputs: [tokens, in], inputs of the reference outputs; None: the sample too
    """
    x = stats.sample.float()
    references = [(x if reference_inputs is None else reference_inputs.float()) @ w.T for w in weights]
    importance = x.square().mean(0)
    unscaled = torch.ones(x.shape[1], device=x.device)
    best, best_loss = unscaled, float("inf")
    for s in (unscaled, *candidates):
        if not bool(s.isfinite().all()):
            continue
        y = _activations(x / s, stats.divided_by(s).absmax, scheme)
        scaled = [w * s for w in weights]
        amax = shared_amax(scaled, scheme.weights)
        outputs = []
        for w in scaled:
            p = find_params(w, scheme.weights, dtype, importance=importance / s.square(), amax=amax)
            outputs.append(y @ dequantize(quantize(w, p, scheme.weights)).T)
        candidate_loss = loss(outputs, references)
        if candidate_loss < best_loss:
            best, best_loss = s, candidate_loss
    return best


def _activations(x: Tensor, absmax: Tensor | None, scheme: Scheme) -> Tensor:
    if scheme.activations is None:
        return x
    assert absmax is not None
    static = absmax.new_tensor([static_scale(float(absmax.max()), scheme.activations)])
    return quantize_activations(x, scheme.activations, static)


def smoothquant_candidates(weights: list[Tensor], stats: Stats) -> list[Tensor]:
    """SmoothQuant's scales, [in] each, for migration strengths 0.2 to 0.9."""
    assert stats.absmax is not None
    maxima = [stats.absmax.clamp_min(1e-5)]
    if stats.by_time is not None:
        maxima.append(stats.by_time.clamp_min(1e-5).log().mean(0).exp())
    w = torch.stack([t.abs().amax(0) for t in weights]).amax(0).clamp_min(1e-5)
    return [_centered(x.pow(a / 20) / w.pow(1 - a / 20), stats) for x in maxima for a in range(4, 19)]


def awq_candidates(weights: list[Tensor], stats: Stats) -> list[Tensor]:
    """AWQ's scales, [in] each, for exponents 1/20 to 19/20."""
    assert stats.mean_abs is not None
    return [_centered(stats.mean_abs.pow(k / 20).clamp_min(1e-4), stats) for k in range(1, 20)]


def _centered(s: Tensor, stats: Stats) -> Tensor:
    """The scale with geometric centre 1; channels that were never active get 1."""
    live = stats.mean_square > 0
    if not bool(live.any()):
        return torch.ones_like(s)
    s = s / (s[live].amax() * s[live].amin()).sqrt()
    return torch.where(live, s.clamp(1e-3, 1e3), torch.ones_like(s))


def smoothquant(state: BlockState, schemes: dict[str, Scheme], seed: int) -> None:
    """Apply SmoothQuant to a block."""
    smooth_block(state, schemes, smoothquant_candidates)


def awq(state: BlockState, schemes: dict[str, Scheme], seed: int) -> None:
    """Apply AWQ to a block."""
    smooth_block(state, schemes, awq_candidates)


def smooth_block(
    state: BlockState,
    schemes: dict[str, Scheme],
    candidates_of: Callable[[list[Tensor], Stats], list[Tensor]],
    loss: Callable[[BlockState, LinearGroup], Loss] = lambda state, group: squared_error,
) -> None:
    """Search a scale for every group of the block, and fold it into the group's source.

    Groups without a source are left out, but in a diffusion transformer their inputs are scaled at run time.

    schemes: {linear name: scheme}; groups with skipped linears or several schemes are left out; loss: makes a group's loss
    """
    for group in state.block.groups:
        chosen = {schemes.get(linear.name) for linear in group.linears}
        scheme = chosen.pop()
        at_run_time = group.declared.source is None and state.structure.family.streams is not None
        if scheme is None or chosen or (group.declared.source is None and not at_run_time):
            continue
        if not state.stats[group.key].tokens or not (at_run_time or foldable(state, group)):
            continue
        stats, original = state.stats[group.key], state.originals.get(group.key)
        search_stats = stats if original is None or state.distort else original
        weights = [state.weight(linear) for linear in group.linears]
        candidates = candidates_of(weights, search_stats)
        if not at_run_time:
            candidates = [shared_heads(state, group, s) for s in candidates]
        reference_inputs = None if original is None else original.sample
        s = search(
            weights, search_stats, scheme, candidates, state.structure.dtype, loss(state, group), reference_inputs
        )
        if bool((s == 1).all()):
            continue
        if at_run_time:
            state.scales[group.key] = (1 / s).to(state.structure.dtype)
        else:
            fold(state, group, s)


def shared_heads(state: BlockState, group: LinearGroup, s: Tensor) -> Tensor:
    """The scale with one value for all heads that read the same value channel (grouped-query attention)."""
    source = _source(state, group)
    if not isinstance(source, nn.Linear) or source.out_features == len(s):
        return s
    repeat = len(s) // source.out_features
    head = head_width(state.structure.text_config)
    grouped = s.view(-1, repeat, head)
    return grouped.log().mean(1, keepdim=True).exp().expand_as(grouped).reshape(-1)


def _source(state: BlockState, group: LinearGroup) -> nn.Module:
    assert group.declared.source is not None
    return state.module.get_submodule(group.declared.source)


def fold(state: BlockState, group: LinearGroup, s: Tensor) -> None:
    """Divide the group's input by s at its source and multiply the weights by s.

    A norm's weight is stored in the model's dtype, so the s that it really divides by is computed back from the rounded
    value and used for the weights: the fold is exact, not only close.
    """
    source = _source(state, group)
    if isinstance(source, nn.Linear):
        rows = s if source.out_features == len(s) else _first_of_each_head_group(state, s, source.out_features)
        linear = next(x for x in state.block.linears if x.param == f"{group.declared.source}.weight")
        state.changed[linear.name] = state.weight(linear) / rows[:, None]
        if source.bias is not None:
            state.assign(source.bias, source.bias.data.float() / rows)
    else:
        s = _fold_norm(state, source, s, _offset(state, group) or 0.0)
    for linear in group.linears:
        state.changed[linear.name] = state.weight(linear) * s
    for name in group.declared.also:
        reader = state.module.get_submodule(name)
        weight: Any = reader.weight
        state.assign(weight, weight.data.float() * s)
    state.divided[group.key] = s * state.divided[group.key] if group.key in state.divided else s
    for stats in (state.stats, state.originals):
        if group.key in stats:
            stats[group.key] = stats[group.key].divided_by(s)


def foldable(state: BlockState, group: LinearGroup) -> bool:
    """Whether a scale can be folded into the group's source."""
    has_source = group.declared.source is not None and group.key not in state.unproved
    return has_source and _offset(state, group) is not None


def _offset(state: BlockState, group: LinearGroup) -> float | None:
    """What the group's source adds to its weight; None where a scale cannot be folded into it."""
    source = _source(state, group)
    if isinstance(source, nn.Linear) or not state.structure.is_discovered:
        return state.structure.family.norm_offset
    return norm_offset(source)


def _fold_norm(state: BlockState, norm: nn.Module, s: Tensor, offset: float) -> Tensor:
    weight: Any = norm.weight
    old_gain = weight.data.float() + offset
    state.assign(weight, old_gain / s - offset)
    new_gain = weight.data.float() + offset
    bias: Any = getattr(norm, "bias", None)
    exact = torch.where((old_gain != 0) & (new_gain != 0), old_gain / new_gain, s)
    if bias is not None:
        state.assign(bias, bias.data.float() / exact)
    return exact


def _first_of_each_head_group(state: BlockState, s: Tensor, out: int) -> Tensor:
    head = head_width(state.structure.text_config)
    return s.view(-1, len(s) // out, head)[:, 0].reshape(-1)
