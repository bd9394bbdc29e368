"""Why stock transformers does not load a result in the format of compressed-tensors, as far as the model's class shows.

transformers and compressed-tensors put packed tensors in the place of a linear's weight. Code of the class that looks at that
weight while the model is loaded fails then, and so do conversions of the file that transformers applies beside its quantizer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qkit.families.structure import ModelStructure
from qkit.tensor.formats import layout

if TYPE_CHECKING:
    from qkit.planning.plan import Plan

_ADVICE = "use qkit.load, or --export qkit"


def stock_refusal(plan: Plan, structure: ModelStructure) -> str | None:
    """The reason in words; None where none is known. Declared families are known to load, or listed in ``engines``."""
    if not structure.is_discovered or structure.family.streams is not None or plan.export != "compressed-tensors":
        return None
    twin = next(iter(structure.twins), None)
    if twin is not None:
        return f"its {twin} has the weights of {structure.twins[twin]}, and only plain ones are shared: {_ADVICE}"
    layouts = {n: layout(p.weights, p.activations) for n, p in plan.packed.items()}
    packed = {n for n, kind in layouts.items() if kind.endswith("pack-quantized")}
    modules = {x.name: f"{b.path}.{x.owner}" for b in structure.every_block for x in b.linears if x.expert is None}
    reader = _initializer(structure.model, {modules[n] for n in packed if n in modules})
    if reader is not None:
        return f"its {reader} looks at the weight of a linear while it loads, which a packed one has not: {_ADVICE}"
    joined = _conversion(structure, set(layouts), bool(packed), {modules[n] for n in layouts if n in modules})
    if joined is not None:
        return f"it joins or splits {joined} while it loads, which fails beside packed tensors: {_ADVICE}"
    return None


def _initializer(model: nn.Module, linears: Collection[str]) -> str | None:
    """The class whose ``_init_weights`` cannot do without the weight of these linears.

    transformers calls it for every module that has parameters which are not in the file under their own names.
    """
    tried: set[tuple[object, ...]] = set()
    with _without_weights(model, linears):
        for path in _around(linears):
            owner = _owner(model, path)
            module = model.get_submodule(path)
            inside = tuple(n for n, _ in module.named_children() if f"{path}.{n}" in linears)
            key = (type(owner), type(module), path in linears, inside)
            if owner is None or key in tried:
                continue
            tried.add(key)
            try:
                with torch.inference_mode():  # blocks that were run may have left such tensors behind
                    owner._init_weights(module)
            except AttributeError as error:
                if "'weight'" in str(error):
                    return type(owner).__name__
    return None


@contextmanager
def _without_weights(model: nn.Module, linears: Collection[str]) -> Iterator[None]:
    """The skeleton as transformers has it while packed linears are loaded."""
    weights = {path: model.get_submodule(path)._parameters.pop("weight") for path in linears}
    try:
        yield
    finally:
        for path, weight in weights.items():  # in their place before the bias
            parameters = model.get_submodule(path)._parameters
            others = dict(parameters)
            parameters.clear()
            parameters.update({"weight": weight, **others})


def _around(linears: Collection[str]) -> list[str]:
    """The linears and the modules around them, in a fixed order."""
    paths = {".".join(path.split(".")[:end]) for path in linears for end in range(1, path.count(".") + 2)}
    return sorted(paths)


def _owner(model: nn.Module, path: str) -> Any:
    """The innermost model of transformers that has a module, or is it: its ``_init_weights`` is the one that is called."""
    parts = path.split(".")
    inside = (model.get_submodule(".".join(parts[:end])) for end in range(len(parts), -1, -1))
    return next((m for m in inside if hasattr(m, "_init_weights") and hasattr(m, "base_model_prefix")), None)


def _conversion(
    structure: ModelStructure, quantized: Collection[str], packed: bool, modules: Collection[str]
) -> str | None:
    """A stored tensor whose conversion fails beside the quantizer.

    transformers lets each converter of weights decode packed ones first, which cannot split what it made, and which drops
    tensors that are not packed. A converter whose targets are themselves packed is left as it is.
    """
    scales = "\n".join(f"{module}.weight_scale" for module in modules)
    for found in structure.names.conversion.converted:
        if not all(source.endswith(".weight") for source in found.sources):
            continue
        if re.search(f"{found.targets[0]}_scale$", scales, re.MULTILINE):
            continue
        plain = [n for n in found.stored if n.removesuffix(".weight") not in quantized]
        if len(found.targets) > 1 or (packed and plain):
            return (plain or list(found.stored))[0]
    return None
