"""Who writes what of a checkpoint, and what a process reads from which file.

Tensors are sets of boxes (see `parallel.part`). Of what several processes hold alike one writes,
so that all write about as much. A checkpoint's index names the boxes of each tensor; whoever loads
copies what they have in common with its own boxes, whatever the layouts were.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from moebius.errors import CheckpointError
from moebius.parallel.part import Box, Parts
from moebius.trainer.checkpoint.files import DTYPES, NAMES

KINDS = ("model", "optimizer")


@dataclass(frozen=True)
class Listing:
    """What one process holds of a tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Stored:
    """A box of a tensor and the file that has it."""

    file: str
    box: Box


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: str
    stored: tuple[Stored, ...]


Index = dict[str, Entry]
"""by name"""


def listing(parts: Parts) -> list[Listing]:
    """What this process holds, to be told to the others."""
    return [
        Listing(name, part.shape, NAMES[part.dtype], tuple(chunk.box for chunk in part.chunks))
        for name, part in sorted(parts.items())
    ]


def plan(listings: Sequence[Sequence[Listing]]) -> Index:
    """The index of a checkpoint, the same on every process, from what each one holds.

    Raises RuntimeError where processes disagree on a tensor or their boxes do not fill it: a layout
    has told something wrong.
    """
    holders: dict[str, dict[Box, list[int]]] = {}
    tensors: dict[str, Listing] = {}
    for rank, own in enumerate(listings):
        for item in own:
            first = tensors.setdefault(item.name, item)
            if (first.shape, first.dtype) != (item.shape, item.dtype):
                raise RuntimeError(f"{item.name} is not alike on all processes: {first}, {item}")
            for box in item.boxes if math.prod(item.shape) else ():
                holders.setdefault(item.name, {}).setdefault(box, []).append(rank)
    load = [0] * len(listings)
    index: Index = {}
    for name, item in sorted(tensors.items()):
        stored = []
        boxes = holders.get(name, {})
        for box, ranks in sorted(boxes.items(), key=lambda pair: pair[0].offsets):
            writer = min(ranks, key=lambda rank: (load[rank], rank))
            load[writer] += box.numel * DTYPES[item.dtype].itemsize
            stored.append(Stored(file_name(name.partition("/")[0], writer), box))
        if sum(box.numel for box in boxes) != math.prod(item.shape):
            raise RuntimeError(f"{name} {item.shape} is not the sum of {list(boxes)}")
        index[name] = Entry(item.shape, item.dtype, tuple(stored))
    return index


def file_name(kind: str, rank: int) -> str:
    """The file that a process writes of the model or of the optimizer's state."""
    return f"{kind}-{rank:05}.safetensors"


def key(name: str, entry: Entry, box: Box) -> str:
    """A tensor's name in a file: that of the whole, with the range of a part as in Python."""
    name = name.partition("/")[2]
    if box.sizes == entry.shape:
        return name
    ends = (start + size for start, size in zip(box.offsets, box.sizes, strict=True))
    ranges = (f"{a}:{b}" for a, b in zip(box.offsets, ends, strict=True))
    return f"{name}[{','.join(ranges)}]"


def total_bytes(index: Index) -> int:
    """Size of all tensors."""
    return sum(math.prod(e.shape) * DTYPES[e.dtype].itemsize for e in index.values())


def write_index(index: Index) -> str:
    """The index as JSON."""
    return json.dumps(
        {
            name: {
                "shape": entry.shape,
                "dtype": entry.dtype,
                "parts": [[s.file, s.box.offsets, s.box.sizes] for s in entry.stored],
            }
            for name, entry in index.items()
        },
        indent=0,
    )


def read_index(text: bytes) -> Index:
    """Raises ValueError where it is none."""
    try:
        return {
            name: Entry(
                tuple(node["shape"]),
                node["dtype"],
                tuple(Stored(f, Box(tuple(o), tuple(s))) for f, o, s in node["parts"]),
            )
            for name, node in json.loads(text).items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no index: {error}") from None


@dataclass(frozen=True)
class Read:
    """Copy a box out of a file's tensor."""

    file: str
    key: str
    source: Box
    """what the file has"""
    name: str
    chunk: int
    """which of the own chunks it goes to"""
    box: Box
    """what both have in common"""


def reads(index: Index, parts: Parts) -> Iterator[Read]:
    """What fills the own parts. Raises CheckpointError where the checkpoint lacks some of it."""
    for name, part in parts.items():
        entry = index[name]
        for number, chunk in enumerate(part.chunks):
            missing = chunk.box.numel
            for stored in entry.stored:
                common = stored.box.common(chunk.box)
                if common is not None:
                    missing -= common.numel
                    where = key(name, entry, stored.box)
                    yield Read(stored.file, where, stored.box, name, number, common)
            if missing:
                raise CheckpointError(f"checkpoint: {missing} elements of {name} are in no file")


def check_index(index: Index, wanted: Mapping[str, tuple[int, ...]], kinds: Iterable[str]) -> None:
    """Raise CheckpointError where a checkpoint's tensors of some kinds are not a model's.

    `wanted` are the shapes of these.
    """
    there = {name for name in index if name.partition("/")[0] in kinds}
    for name in sorted(wanted.keys() ^ there):
        where = "checkpoint" if name in wanted else "model"
        raise CheckpointError(f"checkpoint: {name.partition('/')[2]} is not in the {where}")
    for name, shape in wanted.items():
        if index[name].shape != shape:
            raise CheckpointError(
                f"checkpoint: {name.partition('/')[2]} is {list(index[name].shape)}, "
                f"the model's is {list(shape)}"
            )
