"""What the tables of engines are asked with, and what they answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qkit.verification.loaded_layers import LoadedLayer
from qkit.verification.vllm_table import CPU, GPUS, Choice

RUN = "run"  # the file was run in the engine
SELECTED = "selected by the engine's code"
TABLE = "from a table ({})"  # of an engine and its version
VLLM_TABLE, STOCK_TABLE = TABLE.format("vLLM 0.32"), TABLE.format("transformers 5.24")
OWN = "qkit's own reader"
PLATFORMS = (*GPUS, CPU)


@dataclass(frozen=True)
class EngineFit:
    """How one engine loads a combination of formats. ``loads_as`` None: it does not; ``limits``: the reason, or limits to
    know.

    known: how the answer is known: RUN, SELECTED, TABLE or OWN; platforms: the kinds of GPU, or "cpu", that load it, where the
    engine asks which it is; kernels: of each kind that was asked, what runs layers and how many, or why none does
    """

    engine: str
    loads_as: str | None
    limits: tuple[str, ...]
    known: str
    platforms: tuple[str, ...] = ()
    kernels: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Selected:
    """What vLLM's own code selected. version: 'vLLM 0.32.0'; by_gpu: {kind of GPU: {linear: (vLLM's name of its layer, the
    choice)}}; refused: {kind of GPU: why it does not make the model}."""

    version: str
    by_gpu: Mapping[str, Mapping[str, tuple[str, Choice]]]
    refused: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Properties of a model, beside the formats of some linears, that decide which engine loads them.

    model_type: of config.json, or of the language model inside; kind: the class of the model; images: whether it
    reads images; dtype: of config.json
    experts: whether some of the linears are experts; siglip: whether a SigLIP tower of the model is packed; uses: of a matrix
    outside the blocks, "embeddings", "head" or both
    torn, uneven: of the whole model, the first linears that vLLM loads as one and that have several formats, or rows that
    a block does not divide; torn_experts: the first layer whose experts have several formats; several_experts: whether the
    experts of the whole model have; refusal: why stock transformers does not load the model, where its writer knew
    layers: what vLLM makes of the linears; none: one that every kernel takes; unshared: why its ranks cannot share the model
    platforms: the kinds of GPU, or "cpu", that are asked for
    """

    model_type: str = ""
    kind: str = ""
    images: bool = False
    dtype: str = "bfloat16"
    experts: bool = False
    siglip: bool = False
    torn: str = ""
    uneven: str = ""
    torn_experts: str = ""
    several_experts: bool = False
    refusal: str = ""
    uses: tuple[str, ...] = ()
    layers: Sequence[LoadedLayer] = ()
    ranks: int = 1
    unshared: str = ""
    platforms: tuple[str, ...] = PLATFORMS
