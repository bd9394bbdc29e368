"""Files in MLX's layout in MLX itself: its weights are those of qkit, and so are the logits of the model that mlx_lm loads."""

import json
from pathlib import Path
from typing import Any

import in_mlx
import pytest
import tiny_models
import torch

import qkit
from qkit.files.sources.packed import open_packed
from qkit.tensor.qtensor import dequantize

pytestmark = in_mlx.needed
NOISE = 2e-5  # of log-probabilities, from sums in another order; a scale that is wrong makes it about 1
MIXED = """
scheme: W4A16
group_size: 32
embeddings: int4:32
rules:
  - match: '*.o_proj'
    scheme: MXFP8A16
  - match: '*.self_attn.*'
    scheme: W6A16
    group_size: 64
  - match: '*.layers.1.mlp.down_proj'
    skip: kept in 16 bits
"""


def check(out: Path, work: Path) -> None:
    own, packed = in_mlx.weights(out, work), open_packed(out)
    assert own.keys() == {f"{name}.weight" for name in packed.linears}
    for name, linear in packed.linears.items():
        assert torch.equal(dequantize(linear.read(packed.checkpoint)[0]), own[f"{name}.weight"])
    tokens = tiny_models.tokens()
    mine = torch.log_softmax(tiny_models.logits(qkit.load(out, dtype=torch.float32), tokens), -1)
    assert float((in_mlx.log_probabilities(out, tokens, work) - mine).abs().max()) < NOISE


SCHEMES = [
    *((f"w{bits}a16", {"group_size": group}) for bits, group in ((2, 32), (3, 64), (4, 64), (5, 32), (6, 64), (8, 32))),
    ("w4a16_asym", {"group_size": 32}),
    ("w8a16_asym", {"group_size": 64}),
    ("mxfp4a16", {}),
    ("mxfp8a16", {}),
]


@pytest.mark.parametrize(("scheme", "options"), SCHEMES, ids=[name for name, _ in SCHEMES])
def test_every_grid(scheme: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_models.make("llama", tmp_path / "model", intermediate_size=128)
    qkit.quantize(model, out=tmp_path / "out", scheme=scheme, export="mlx", **options)
    check(tmp_path / "out", tmp_path)


def test_formats_for_single_layers_and_embeddings(tmp_path: Path) -> None:
    model = tiny_models.make("llama", tmp_path / "model", intermediate_size=128)
    (tmp_path / "rules.yaml").write_text(MIXED)
    qkit.quantize(model, out=tmp_path / "out", recipe=tmp_path / "rules.yaml", export="mlx")
    kinds = {json.dumps(v, sort_keys=True) for v in json.loads((tmp_path / "out" / "config.json").read_text())[
        "quantization"].values()}  # fmt: skip
    assert len(kinds) > 5
    check(tmp_path / "out", tmp_path)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3"])
def test_other_models(kind: str, tmp_path: Path) -> None:
    model = tiny_models.make(kind, tmp_path / "model")
    qkit.quantize(model, out=tmp_path / "out", scheme="w4a16", group_size=32, export="mlx", engine="any")
    check(tmp_path / "out", tmp_path)
