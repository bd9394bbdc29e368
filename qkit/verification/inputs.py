"""The check of what is done to inputs of linears at run time: its tensors are there and agree with the record.

Part of the independent proof (see ``verify.py``). A loader that misses a transform multiplies inputs with a weight that was
made for others, so a tensor that belongs to none is a problem, too.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qkit.verification.decode import StoredTensor
from qkit.verification.record import Findings, Record, RecordedLinear

_SCALE, _RESIDUAL = "pre_quant_scale", "input_residual"


def check_inputs(record: Record, store: Mapping[str, StoredTensor], findings: Findings) -> None:
    """Checks the residual channels and the scales of the inputs of every linear against qkit.json."""
    for linear in record.linears.values():
        _check_residual(linear, store.get(f"{linear.name}.{_RESIDUAL}"), findings)
    expected = {_SCALE: {x.name for x in record.linears.values() if x.scaled}}
    expected[_RESIDUAL] = {x.name for x in record.linears.values() if x.residual}
    for suffix, names in expected.items():
        present = {name.rpartition(".")[0] for name in store if name.rpartition(".")[2] == suffix}
        own = {name.rpartition(".")[0] for name in record.plain}  # a model may have parameters of this name
        for name in sorted(present ^ names):
            if name not in record.linears and name in own:
                continue
            fault = "belongs to no linear of qkit.json" if name in present else "is missing"
            findings.check("inputs", False, f"{name}.{suffix}", fault)


def _check_residual(linear: RecordedLinear, stored: StoredTensor | None, findings: Findings) -> None:
    if not linear.residual or stored is None:
        return
    where = f"{stored.path.name}: {linear.name}.{_RESIDUAL}"
    shaped = stored.dtype == "I32" and stored.shape == (linear.residual,)
    mismatch = f"found {stored.dtype} {list(stored.shape)}, expected I32 [{linear.residual}]"
    if findings.check("inputs", shaped, where, mismatch):
        channels = stored.array()
        inside = bool(((channels >= 0) & (channels < linear.shape[1])).all()) and len(np.unique(channels)) == len(
            channels
        )
        findings.check("inputs", inside, where, f"expected different channels of {linear.shape[1]}")
