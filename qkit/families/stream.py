"""How values pass through a model: what a run of its skeleton shows of the residual stream, and of what scales pass through.

``stream_trace`` watches the run. Here is what it finds, by the names of parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


def channel_range(width: int) -> Tensor:
    """0, 1, .. width - 1, int32, with memory, also where modules are built without."""
    return torch.arange(width, dtype=torch.int32, device="cpu")


@dataclass(frozen=True)
class Feed:
    """The output channels of one linear that are the input channels of another, up to factors of their own.

    source:   the parameter of the linear that they leave
    channels: int32 [in], the output channel behind each input channel
    head:     width of the heads that they were split into on the way, None: they were not
    mixes:    a matrix inside each head passes through, too: nothing on the way looks at single channels
    """

    source: str
    channels: Tensor = field(compare=False)
    head: int | None = None
    mixes: bool = True

    def head_pattern(self, outputs: int) -> bool:
        """Whether channels follow in order, with every head of the source repeated (grouped-query attention).

        outputs: channels of the source
        """
        width = len(self.channels)
        if outputs == width:
            return bool((self.channels == channel_range(width)).all())
        if self.head is None or width % outputs or outputs % self.head:
            return False
        heads = channel_range(outputs).view(-1, 1, self.head).expand(-1, width // outputs, -1)
        return bool((self.channels == heads.reshape(-1)).all())


@dataclass(frozen=True)
class Place:
    """Where a block gets and returns the stream.

    argument: by its position or name; result: the place in the ``count`` values that it returns, None: it returns no others
    """

    argument: int | str
    result: int | None
    count: int


@dataclass
class Stream:
    """The residual stream of a model: what reads it and what writes it, by the names of parameters.

    table:   the embeddings whose rows enter it
    reads:   {matrix: the norm before it, '' for none}
    writes:  {matrix: its bias, '' for none}
    offsets: {norm: what it adds to its weight before it multiplies by it}
    feeds:   {matrix: what feeds it}
    places:  {block: where it gets and returns the stream}
    transposed: parameters that hold a matrix as [in, out]
    against: why an orthogonal matrix cannot be folded into the weights; '' where it can
    """

    table: str = ""
    reads: dict[str, str] = field(default_factory=dict)
    writes: dict[str, str] = field(default_factory=dict)
    offsets: dict[str, float] = field(default_factory=dict)
    feeds: dict[str, Feed] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    transposed: set[str] = field(default_factory=set)
    against: str = ""

    def of(self, block: str) -> BlockStream:
        """What a block does with the stream. block: its path"""
        prefix = f"{block}."

        def inside(name: str) -> str:
            return name.removeprefix(prefix)

        return BlockStream(
            {inside(k): inside(v) for k, v in self.reads.items() if k.startswith(prefix)},
            {inside(k): inside(v) for k, v in self.writes.items() if k.startswith(prefix)},
            {inside(n): offset for n, offset in self.offsets.items() if n.startswith(prefix)},
            {
                inside(k): replace(feed, source=inside(feed.source))
                for k, feed in self.feeds.items()
                if feed.source.startswith(prefix)
            },
            {inside(n) for n in self.transposed if n.startswith(prefix)},
        )

    def outer_reads(self, blocks: tuple[str, ...]) -> dict[str, str]:
        """What reads the stream outside the blocks, such as the output head."""
        return {k: v for k, v in self.reads.items() if not k.startswith(tuple(f"{b}." for b in blocks))}


@dataclass(frozen=True)
class BlockStream:
    """The fields of ``Stream`` for one block, with names inside it."""

    reads: Mapping[str, str]
    writes: Mapping[str, str]
    offsets: Mapping[str, float]
    feeds: Mapping[str, Feed]
    transposed: set[str]

    @property
    def values(self) -> tuple[str, str, int] | None:
        """(the linear of the heads' values, the one that reads them, width of a head), where a matrix inside each head may be
        multiplied into both."""
        for reader, feed in self.feeds.items():
            if feed.head is not None and feed.mixes and not len(feed.channels) % feed.head:
                by_head = feed.channels.view(-1, feed.head)
                first = by_head[:, :1]
                if bool((first % feed.head == 0).all()) and bool((by_head - first == channel_range(feed.head)).all()):
                    return feed.source, reader, feed.head
        return None
