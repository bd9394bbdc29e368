"""Diffusion models that no declaration describes, by the module tree of their class in diffusers.

Blocks are the entries of module lists that lie in no other such list: the blocks of a transformer, the refiners before them,
the down, middle and up blocks of a U-Net. A list counts when one of its entries has at least three linears, so a list of
projections, or one linear between a dropout and an activation, is none. Nothing is guessed about which linears share an
input: each is a group of its own, which measures the same and only costs memory. How blocks hand their results on is not
guessed either: where a method needs calibration, the inputs of every block are recorded in runs of the whole model
(``engine.recorded``).
"""

from __future__ import annotations

import inspect
from collections.abc import Container
from typing import Any

from torch import nn

from qkit.errors import Unsupported
from qkit.families import Family
from qkit.families.blocks import Streams
from qkit.families.dit import SKIPS
from qkit.families.matrices import UNKNOWN_REASON

CONVOLUTION = "it is a convolution, and qkit quantizes linears"
TABLE = "it is a table, or a layer that is not linear"
_FEWEST_LINEARS = 3
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PACKAGES = (".models.transformers.", ".models.unets.", ".pipelines.deprecated.")


def denoiser_class(name: Any, diffusers: Any) -> Any:
    """The transformer or U-Net of diffusers with that name; None: there is none, or it is a model of another kind."""
    found = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not inspect.isclass(found) or not issubclass(found, diffusers.ModelMixin):
        return None
    return found if any(package in found.__module__ for package in _PACKAGES) else None


def is_denoiser(model: nn.Module) -> bool:
    """Whether the model is one of ``denoiser_class``."""
    return any(package in type(model).__module__ for package in _PACKAGES)


def discover(model: nn.Module, name: str) -> Family:
    """The family of a class, from its modules. Raises Unsupported for a model without a list of blocks."""
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and _is_list_of_blocks(m)]
    outermost = [(path, m) for path, m in lists if not any(path.startswith(f"{other}.") for other, _ in lists)]
    if not outermost:
        raise Unsupported(
            f"{name} has no list of blocks with {_FEWEST_LINEARS} linears or more in one: there is nothing to quantize block "
            "by block"
        )
    blocks: list[str] = []
    for path, m in outermost:
        entries = list(m.named_children())
        with_linears = [f"{path}.{key}" for key, entry in entries if _linears(entry)]
        blocks += [path] if len(with_linears) == len(entries) else with_linears
    return Family(
        name=f"discovered:{name}",
        model_types=(name,),
        blocks=tuple(blocks),
        groups=(),
        streams=Streams((), (), recorded=True),
        skips=SKIPS,
        embeddings="",
        head="",
    )


def unquantized(model: nn.Module, stored: Container[str]) -> dict[str, str]:
    """{module: reason} of all modules with stored weights of two dimensions or more that are no linears."""
    reasons = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            owned = {name: p for name, p in module.named_parameters(recurse=False) if p.dim() >= 2}
            # One that qkit takes apart is in no tensor of this name (``matrices.stacks_of``).
            several = any(p.dim() == 3 and "proj" in name and f"{path}.{name}" in stored for name, p in owned.items())
            if f"{path}.weight" in stored and "weight" in owned:
                reasons[path] = CONVOLUTION if isinstance(module, _CONVOLUTIONS) else TABLE
            elif several and path:
                reasons[path] = UNKNOWN_REASON
            else:
                reasons |= {f"{path}.{name}": TABLE for name in owned if f"{path}.{name}" in stored}
    return reasons


def _linears(module: nn.Module) -> int:
    return sum(isinstance(m, nn.Linear) for m in module.modules())


def _is_list_of_blocks(modules: nn.ModuleList) -> bool:
    return any(_linears(entry) >= _FEWEST_LINEARS for entry in modules)
