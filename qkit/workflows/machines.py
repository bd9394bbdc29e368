"""The machine that ``qkit recommend`` is asked about."""

from __future__ import annotations

from dataclasses import dataclass

from qkit.allocation.limits import parse_bytes
from qkit.errors import UsageError
from qkit.planning.devices import CPU, Device, find_device
from qkit.planning.engine_rules import LLAMA_CPP
from qkit.system.machine import machine_memory

ENGINES = ("vllm", LLAMA_CPP, "transformers")
VLLM_SHARE = 0.92  # of a GPU's memory, that vLLM 0.32 uses (--gpu-memory-utilization)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a file is to run on. memory, usable: bytes of all its GPUs; platform: the kind of GPU, None for any"""

    engine: str
    device: Device | None
    memory: int
    usable: int
    gpus: int = 1

    @property
    def platform(self) -> str | None:
        """The kind of GPU, or "cpu"; None for any GPU."""
        return None if self.device is None else self.device.platform

    @property
    def gpu(self) -> str | None:
        """The --gpu of the engine that asks which it is."""
        return self.platform if self.engine == "vllm" else None

    @property
    def tp(self) -> int | None:
        """The --tp of a recipe: the GPUs that share the model."""
        return self.gpus if self.gpus > 1 else None


def machine_of(memory: str | None, engine: str | None, device: str | None, gpus: int = 1) -> Machine:
    """The machine of a command line. memory: of each GPU. Raises UsageError for one that makes no sense, or whose memory nobody
    said."""
    known = None if device is None else find_device(device)
    on_cpu = known is not None and known.platform == CPU
    name = engine or (LLAMA_CPP if on_cpu else "vllm")
    if name not in ENGINES:
        raise UsageError(f"--engine {name}: expected one of {', '.join(ENGINES)}")
    if gpus > 1 and (name != "vllm" or on_cpu):
        raise UsageError(f"--tp {gpus}: GPUs share a model in vLLM: use --engine vllm, or --memory for all of it")
    size = None if memory is None else parse_bytes(memory, "--memory")
    if memory is not None and memory.strip()[-1].isdigit():
        raise UsageError(f"--memory {memory}: a number without a unit: write {memory.strip()}GB or {memory.strip()}MB")
    if size is None and known is not None:
        size = known.memory
    if size is None and (on_cpu or name == LLAMA_CPP):
        size = machine_memory()
    if size is None:
        raise UsageError("the memory of the machine is not known: add --memory, for instance 24GB, or --device")
    size *= gpus
    usable = int(size * VLLM_SHARE) if name == "vllm" and not on_cpu else size
    return Machine(engine=name, device=known, memory=size, usable=usable, gpus=gpus)
