"""Declarations of text encoders, components of diffusion pipelines, by the names of their classes in transformers.

They are quantized by schemes that need no calibration: in a pipeline there is no text to calibrate them on.
"""

from __future__ import annotations

from qkit.families import Family
from qkit.families.blocks import Group

_WO = "transformers keeps it in float32 and looks at its weight before it runs it"

T5 = Family(
    name="t5",
    model_types=("T5EncoderModel", "UMT5EncoderModel"),
    blocks=("encoder.block",),
    groups=(
        Group(("layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v")),
        Group(("layer.0.SelfAttention.o",)),
        Group(("layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1")),
        Group(("layer.1.DenseReluDense.wi",)),
        Group(("layer.1.DenseReluDense.wo",)),
    ),
    embeddings="shared",
    final_norm="encoder.final_layer_norm",
    head="",
    encodes=True,
    skips=(("*.DenseReluDense.wo", _WO),),
    note="T5 and UMT5 encoders",
)

FAMILIES = (T5,)
ENCODERS = tuple(name for family in FAMILIES for name in family.model_types)
