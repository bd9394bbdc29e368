"""The device that a command computes on."""

from __future__ import annotations

import torch

from qkit.errors import UsageError

AUTO = "auto"


def find_device(asked: str) -> str:
    """The name of a device as torch has it, of ``--device``: 'auto' is the first GPU where torch sees one, else the CPU.

    Raises UsageError for a device that is not here.
    """
    if asked == AUTO:
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError:
        device = None
    # Devices of other makers have the name that their package registers with PyTorch.
    if device is None or device.type not in ("cpu", "cuda", torch._C._get_privateuse1_backend_name()):
        raise UsageError(
            f"--device {asked}: qkit does not compute on such a device: use auto, cpu, cuda, or cuda:1 for the second GPU"
        )
    if device.type != "cuda":
        return str(device)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise UsageError(
            f"--device {asked}: PyTorch {torch.__version__} sees no GPU: use --device cpu, or install a driver and a PyTorch "
            "for CUDA"
        )
    if (device.index or 0) >= count:
        raise UsageError(
            f"--device {asked}: the last GPU that PyTorch sees is cuda:{count - 1}: use that, or one before it"
        )
    return f"cuda:{device.index or 0}"
