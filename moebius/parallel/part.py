"""What a process holds of a tensor of the whole model, as boxes of it: any layout can read them.

Cuts (see `placement.Cut`) leave a process some elements along some dimensions; sharing out leaves
it a range of these, flattened. Both together are a few boxes of the whole tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.parallel.placement import Cut


@dataclass(frozen=True)
class Box:
    """A range along each dimension of a tensor; one box of no dimensions is a scalar."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.sizes)

    def common(self, other: Box) -> Box | None:
        """What two boxes have in common, None where that is nothing."""
        starts = [max(pair) for pair in zip(self.offsets, other.offsets, strict=True)]
        ends = [
            min(a + s, b + t)
            for a, s, b, t in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        ]
        sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return Box(tuple(starts), sizes) if all(size > 0 for size in sizes) else None

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Where it is in a tensor that has the elements of an outer box."""
        places = zip(self.offsets, outer.offsets, self.sizes, strict=True)
        return tuple(slice(own - out, own - out + size) for own, out, size in places)


@dataclass(frozen=True)
class Chunk:
    """A box of a whole tensor, and where its values are kept."""

    box: Box
    tensor: Tensor
    """a view; writing into it sets the model's or the optimizer's values"""


@dataclass(frozen=True)
class Part:
    """What this process holds of a tensor."""

    shape: tuple[int, ...]
    """of the whole tensor"""
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]
    local: Tensor
    """what the chunks are views of"""

    @classmethod
    def of(
        cls,
        tensor: Tensor,
        cuts: Sequence[Cut] = (),
        local: Sequence[int] | None = None,
        start: int = 0,
    ) -> Part:
        """`tensor` has the elements from `start` on of what `cuts` leave, flattened.

        `local` is the shape of what they leave; None: that of `tensor`, which has all of it.
        """
        local = tuple(tensor.shape) if local is None else tuple(local)
        shapes = [local]
        """before the last cut, ... before the first"""
        for cut in reversed(cuts):
            sizes = list(shapes[-1])
            sizes[cut.dim] *= cut.num_parts
            shapes.append(tuple(sizes))
        chunks = list(_flat_chunks(tensor.detach(), local, start))
        for cut, before in zip(reversed(cuts), shapes[1:], strict=True):
            chunks = [piece for chunk in chunks for piece in _uncut(chunk, cut, before[cut.dim])]
        return cls(shapes[-1], tensor.dtype, tuple(chunks), tensor)


Parts = Mapping[str, Part]
"""by name: `model/<parameter or buffer>`, `optimizer/<parameter>/<key>`"""


def _flat_chunks(tensor: Tensor, shape: tuple[int, ...], start: int) -> Iterator[Chunk]:
    """A range of a flattened tensor as boxes, each of which lies in one piece."""
    if tensor.numel() == math.prod(shape):
        yield Chunk(Box((0,) * len(shape), shape), tensor.view(shape))
        return
    flat = tensor.reshape(-1)
    for at, box in _boxes(shape, start, start + tensor.numel()):
        yield Chunk(box, flat[at - start : at - start + box.numel].view(box.sizes))


def _boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[tuple[int, Box]]:
    """Boxes that have the elements from `start` to `end`, with the first element of each."""
    if start >= end:
        return
    row = math.prod(shape[1:])
    first, last = start // row, (end - 1) // row
    if first == last and (start % row or end % row):  # a part of one row
        for at, box in _boxes(shape[1:], start % row, start % row + end - start):
            yield first * row + at, Box((first, *box.offsets), (1, *box.sizes))
        return
    whole_from = -(-start // row)
    whole_to = end // row
    yield from _boxes(shape, start, min(whole_from * row, end))
    if whole_from < whole_to:
        sizes = (whole_to - whole_from, *shape[1:])
        yield whole_from * row, Box((whole_from, *(0 for _ in shape[1:])), sizes)
    yield from _boxes(shape, max(whole_to * row, start), end)


def _uncut(chunk: Chunk, cut: Cut, size: int) -> Iterator[Chunk]:
    """Where a box of what a cut has left lies in the dimension of `size` that was cut."""
    block = size // cut.blocks
    own = block // cut.num_parts
    if own == 0:
        yield chunk
        return
    first = chunk.box.offsets[cut.dim]
    end = first + chunk.box.sizes[cut.dim]
    for number in range(first // own, -(-end // own)):
        start, stop = max(first, number * own), min(end, (number + 1) * own)
        offsets, sizes = list(chunk.box.offsets), list(chunk.box.sizes)
        offsets[cut.dim] = number * block + cut.number * own + start - number * own
        sizes[cut.dim] = stop - start
        view = chunk.tensor.narrow(cut.dim, start - first, stop - start)
        yield Chunk(Box(tuple(offsets), tuple(sizes)), view)
