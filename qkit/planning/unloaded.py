"""The decisions for matrices that the model's class does not load (--unloaded), such as heads for multi-token prediction.

They are in no block that could be run, so they are rounded to nearest. What is not a matrix of a linear by its name stays.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

from qkit.errors import UsageError
from qkit.families.structure import ModelStructure
from qkit.files.safefile import TensorInfo
from qkit.planning.linear_plan import LinearPlan
from qkit.planning.recipe import Recipe, check_options, parse_end
from qkit.tensor.formats import fit_group

UNLOADED_REASON = "the model's class does not load it: --unloaded FORMAT quantizes what is a linear by its name"
STACKED_REASON = (
    "the model's class does not load it, and no block tells how the matrices lie that this one tensor holds"
)
UNLOADED, PLAIN = "unloaded", "rtn"
PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LEAST = 32  # rows and columns: what is smaller is no layer, and saves nothing
_OTHERS = ("embed", "norm", "gate", "router", "head", "wte", "wpe")  # in the name of the module itself; no gate_proj


def unloaded_plans(recipe: Recipe, structure: ModelStructure) -> dict[str, LinearPlan]:
    """{checkpoint name: decision} of these matrices. Raises UsageError where the file has none."""
    if recipe.unloaded is None:
        return {}
    scheme, decided = parse_end(recipe.unloaded, UNLOADED), dict[str, LinearPlan]()
    for name, info in _matrices(structure):
        if min(info.shape) < _LEAST or _is_other(name):
            continue
        weights = fit_group(scheme.weights, info.shape[1], strict=recipe.strict)
        decided[name] = LinearPlan(
            name=name,
            shape=(info.shape[0], info.shape[1]),
            scheme=scheme.name,
            weights=weights,
            activations=None,
            solver=PLAIN,
            options=check_options(PLAIN, (), {}),
            note="the model's class does not load it: it is rounded to nearest",
        )
    if not decided:
        raise UsageError(
            f"--unloaded {recipe.unloaded}: {structure.checkpoint.path} has no matrix of a linear that its class does "
            "not load: leave it out"
        )
    return decided


def skipped_unloaded(structure: ModelStructure, decided: Collection[str]) -> dict[str, str]:
    """{checkpoint name: reason} of the matrices that stay. decided: names of those that do not"""
    stacked = {name: STACKED_REASON for name in _stacks(structure)}
    return stacked | {name: UNLOADED_REASON for name, _ in _matrices(structure) if name not in decided}


def _stacks(structure: ModelStructure) -> Iterator[str]:
    """Yield the checkpoint name, without '.weight', of every tensor of several matrices that the class does not load."""
    for tensor in structure.unloaded:
        info = structure.checkpoint.tensors[tensor]
        if len(info.shape) == 3 and min(info.shape[1:]) >= _LEAST and info.torch_dtype in PLAIN_DTYPES:
            yield tensor.removesuffix(".weight")


def _matrices(structure: ModelStructure) -> Iterator[tuple[str, TensorInfo]]:
    """Yield the checkpoint name, without '.weight', and the header of every matrix that the class does not load."""
    for tensor in structure.unloaded:
        info, name = structure.checkpoint.tensors[tensor], tensor.removesuffix(".weight")
        if name != tensor and len(info.shape) == 2 and info.torch_dtype in PLAIN_DTYPES:
            yield name, info


def _is_other(name: str) -> bool:
    leaf = name.rpartition(".")[2]
    return any(word in leaf for word in _OTHERS) and leaf not in ("gate_proj", "gate_up_proj")
