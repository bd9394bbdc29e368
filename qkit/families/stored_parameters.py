"""The names of a model's parameters in its checkpoint, and views of what the file stores in another form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from qkit.errors import BadCheckpoint
from qkit.families.blocks import Linear
from qkit.families.conversion import Computed, Conversion, stacked
from qkit.files.checkpoint import Checkpoint, View
from qkit.files.sources.decoded import DecodedInfo


class StoredParameters:
    """Where the parameters of a model lie in its checkpoint.

    tied:  {tensor that is not stored: tensor that it shares}, in checkpoint names
    views: {name: view}, of matrices inside a stored tensor, and of parameters that are computed
    twins: blocks that share their matrices with one of the language model (``twins_of``)
    """

    def __init__(
        self, model: nn.Module, checkpoint: Checkpoint, conversion: Conversion, twins: Mapping[str, str]
    ) -> None:
        self.model, self.checkpoint, self.conversion = model, checkpoint, conversion
        self.views: dict[str, View] = {}
        keys = getattr(model, "all_tied_weights_keys", None) or {}
        self.tied = {conversion.stored_name(a): conversion.stored_name(b) for a, b in dict(keys).items()}
        # What a block shares with its twins alone is rounded once for all of them.
        within = tuple(f"{t}." for t in twins)
        self._shared = {conversion.stored_name(b) for a, b in dict(keys).items() if not a.startswith(within)}

    def is_shared(self, name: str) -> bool:
        """Whether several modules have this parameter, other than a block and its twins."""
        stored = self.conversion.stored_name(name)
        return stored in self.tied or stored in self._shared

    def sharing(self, name: str) -> list[str]:
        """Paths of the modules whose 'weight' is one stored tensor with this parameter, its own among them."""
        stored = self.name_of(name)
        named = (n for n, _ in self.model.named_parameters(remove_duplicate=False) if n.endswith(".weight"))
        return [n.removesuffix(".weight") for n in named if self.is_shared(n) and self.name_of(n) == stored]

    def name_of(self, name: str) -> str:
        """The name in ``checkpoint`` of a parameter, with a view of what it is computed from, where it is."""
        computed = self._computed(name)
        if computed is None:
            stored = self.conversion.stored_name(name)
            return self.tied.get(stored, stored)
        for target, shape in computed.shapes.items():
            self.views.setdefault(
                target,
                View(
                    computed.sources,
                    shape,
                    lambda read, t=target: computed.run(read)[t],  # type: ignore[misc]
                ),
            )
        return name

    def add_slice(self, linear: Linear, param: str, shape: tuple[int, ...]) -> None:
        """Add a view of one matrix inside a stored tensor, where the file has that tensor. param, shape: of the whole"""
        computed = self._computed(param)
        if computed is not None:
            compute = computed
            self.views[f"{linear.name}.weight"] = View(
                compute.sources, linear.shape, lambda read: linear.part(compute.run(read)[param]).contiguous()
            )
            return
        source = self.conversion.stored_name(param)
        info = self.checkpoint.tensors.get(source)
        if info is None or f"{linear.name}.weight_scale" in self.checkpoint.tensors:
            return  # its matrices are packed: as [outputs, inputs], also where their codes have the name of the whole
        if linear.expert is None and isinstance(info, DecodedInfo):  # ways of storing codes hold [outputs, inputs]
            return
        if info.shape != shape:
            raise BadCheckpoint(
                f"{self.checkpoint.path}: tensor {source!r} has shape {list(info.shape)}, config.json implies {list(shape)}"
            )
        of_expert = replace(linear, expert=None)
        self.views[f"{linear.name}.weight"] = View(
            (source,), linear.shape, lambda read: of_expert.part(read(source, linear.expert)).contiguous()
        )

    def _computed(self, name: str) -> Computed | None:
        """What computes a parameter, where it is no stored tensor; pieces of another shape than its linears are stacked."""
        pieces = self.conversion.pieces.get(name)
        if pieces is not None:
            return stacked(name, pieces, parameter(self.model, name))
        return self.conversion.computed.get(name)


def parameter(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name."""
    owner, _, leaf = name.rpartition(".")
    value = getattr(module.get_submodule(owner), leaf)
    assert isinstance(value, Tensor)
    return value
