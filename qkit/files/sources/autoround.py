"""AutoRound's own name for files that lie as GPTQ or AWQ does: ``packing_format`` says which."""

from __future__ import annotations

from dataclasses import replace

from qkit.errors import Unsupported
from qkit.files.safefile import shown
from qkit.files.sources import awq, gptq
from qkit.files.sources.decoded import Found, Stored

_PACKINGS = {"auto_round:auto_gptq": gptq.find, "auto_round:auto_awq": awq.find}


def find(stored: Stored) -> Found:
    """The linears of a folder. Raises Unsupported for other packings."""
    packing = stored.quantization.get("packing_format")
    decoder = _PACKINGS.get(packing) if isinstance(packing, str) else None
    if decoder is None:
        raise Unsupported(
            f"{stored.where}: config.json: packing_format is {shown(packing)}, and of AutoRound qkit decodes "
            f"{' and '.join(_PACKINGS)}: dequantize the model first, or use the original"
        )
    config = {key: value for key, value in stored.quantization.items() if key not in ("packing_format", "format")}
    return decoder(replace(stored, quantization=config))
