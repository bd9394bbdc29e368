"""Files of GPTQModel: see common.py. Its environment (it replaces torch by the release that it asks for):

python3.11 -m venv gptqmodel && gptqmodel/bin/pip install torch==2.13.0 wheel ninja
gptqmodel/bin/pip install gptqmodel==7.7.0 --no-build-isolation
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it stops on a machine with two cores without

from common import rows, run
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

WHOLE = "model.layers.0.mlp.down_proj"  # the linear that the file with rules leaves as it is


def write(model: Path, text: Path, out: Path, **config: object) -> None:
    """One file."""
    asked = QuantizeConfig(**{"bits": 4, "group_size": 32, "desc_act": False, "device": "cpu"} | config)
    made = GPTQModel.load(str(model), asked, backend=BACKEND.TORCH)
    made.quantize([{"input_ids": row[None], "attention_mask": row[None] * 0 + 1} for row in rows(model, text)])
    made.save(str(out))


RULES = {rf"-:{WHOLE}".replace(".", r"\."): {}, r"+:.*\.mlp\..*": {"bits": 8, "group_size": 64}}
run(
    {
        "gptq-v1-w4g32": partial(write),
        "gptq-v2-w4g32": partial(write, format="gptq_v2"),
        "gptq-v2-w4g32-asym": partial(write, sym=False, format="gptq_v2"),
        "gptq-w3g32": partial(write, bits=3),
        "gptq-w4g32-actorder": partial(write, desc_act=True),
        "gptq-w8g64": partial(write, bits=8, group_size=64),
        "gptq-dynamic": partial(write, dynamic=RULES),
    }
)
