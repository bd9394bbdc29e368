"""Static precision by metric-decoupled sensitivity: its integer programs against all configurations, and a small pipeline."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers: pip install 'qkit[diffusion]'")
from tiny_dits import make_pipeline

from qkit.diffusion.policy import BITS, NARROW, WIDE
from qkit.diffusion.trajectory import sampling_of
from qkit.runtime.loading import load
from qkit.sensitivity.decoupled import best_of, is_content, splits, sqnr


def some_scores(count: int) -> dict[str, dict[str, float]]:
    drawn = torch.rand(count, 2, generator=torch.Generator().manual_seed(5)).tolist()
    names = [f"blocks.{i}.{'ffn' if i % 3 else 'attn1'}" for i in range(count)]
    return {n: {NARROW: a, WIDE: max(a, b)} for n, (a, b) in zip(names, drawn, strict=True)}


@pytest.mark.parametrize("width", [4.0, 5.0, 6.5, 8.0])
def test_a_program_finds_the_best_of_all_configurations(width: float) -> None:
    scores = some_scores(8)
    names = list(scores)

    def total(made: dict[str, str]) -> float:
        return sum(scores[n][m] for n, m in made.items())

    every = [dict(zip(names, choice, strict=True)) for choice in product((NARROW, WIDE), repeat=8)]
    fitting = [m for m in every if sum(BITS[x] for x in m.values()) <= width * 8]
    assert total(best_of(scores, names, width)) == pytest.approx(max(map(total, fitting)))


@pytest.mark.parametrize("width", [4.0, 5.0, 6.0, 7.3, 8.0])
def test_every_split_keeps_the_budget(width: float) -> None:
    """Groups share the budget out differently, and none spends more than all of it."""
    scores = some_scores(12)
    found = splits(scores, width)
    assert all(set(made) == set(scores) for made in found)
    assert all(sum(BITS[m] for m in made.values()) <= width * 12 for made in found)
    assert len(found) > 1 or width in (4.0, 8.0)
    bits = [
        tuple(sum(BITS[made[n]] for n in scores if is_content(n) is kind) for kind in (True, False)) for made in found
    ]
    assert len(set(bits)) == len(bits)


def test_signal_to_noise() -> None:
    x = [torch.tensor([3.0, 4.0])]
    assert sqnr([torch.tensor([3.0, 4.5])], x) == pytest.approx(20.0) and sqnr(x, x) == 100.0


def test_a_decoupled_policy_is_followed(run, tmp_path: Path) -> None:
    """Every linear has one precision at all steps, the one that was chosen, and the mean is within the budget."""
    source = make_pipeline(tmp_path / "wan", steps=3)
    code, _, err = run("quantize", "--model", source, "--scheme", "6bit", "--out", tmp_path / "a", "--samples", 4,
                       "--policy", "kind=decoupled", "--policy", "width=6", "--policy", "skips=0")  # fmt: skip
    assert code == 0, err
    record = json.loads((tmp_path / "a" / "transformer" / "qkit.json").read_text())["diffusion"]
    assert record["threshold"] == 0.5 and record["fit"]["expected"]["width"] <= 6
    made = {name: offset for name, (_, offset) in record["fits"].items()}
    assert set(made.values()) == {0.0, 1.0}
    pipeline = load(tmp_path / "a", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    sampling = sampling_of(tmp_path / "a", None, {})
    pipeline(prompt=sampling.prompts[0], **sampling.call, output_type="latent")
    chosen = {(c.linear, c.choice) for c in pipeline.transformer.steps.log if c.linear}
    assert chosen == {(name, WIDE if offset else NARROW) for name, offset in made.items()}
