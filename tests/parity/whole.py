"""Whole tensors from everyone's parts, put together the plain way."""

from collections.abc import Mapping

import torch
from torch import Tensor

from moebius.parallel.layout import Layout
from moebius.parallel.part import Parts
from moebius.parallel.together import gathered


def whole_tensors(parts: Parts) -> dict[str, Tensor]:
    """Every tensor by its name in a checkpoint, on all processes; a collective call.

    Every element must be there, and the same wherever it is.
    """
    own = [
        (name, part.shape, chunk.box, chunk.tensor.clone())
        for name, part in parts.items()
        for chunk in part.chunks
    ]
    found: dict[str, Tensor] = {}
    filled: dict[str, Tensor] = {}
    for name, shape, box, value in (item for items in gathered(own) for item in items):
        whole = found.setdefault(name, torch.zeros(shape, dtype=value.dtype))
        there = filled.setdefault(name, torch.zeros(shape, dtype=torch.bool))
        place = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
        assert torch.equal(whole[place][there[place]], value[there[place]]), name
        whole[place] = value
        there[place] = True
    assert all(there.all() for there in filled.values())
    return dict(sorted(found.items()))


def model_tensors(parts: Parts) -> dict[str, Tensor]:
    """Parameters and buffers by their names in the model."""
    own = {name: part for name, part in parts.items() if name.startswith("model/")}
    return {name[6:]: value for name, value in whole_tensors(own).items()}


def buffer_tensors(layout: Layout) -> dict[str, Tensor]:
    """What controllers and routers remember, of all processes together."""
    own = {f"model/{name}" for name, _ in layout.decoder.named_buffers()}
    return model_tensors({n: part for n, part in layout.parts().items() if n in own})


@torch.no_grad()
def fill_parts(parts: Parts, tensors: Mapping[str, Tensor]) -> None:
    """Set the own parts of whole tensors."""
    for name, part in parts.items():
        for chunk in part.chunks:
            ranges = zip(chunk.box.offsets, chunk.box.sizes, strict=True)
            chunk.tensor.copy_(tensors[name][tuple(slice(o, o + s) for o, s in ranges)])
