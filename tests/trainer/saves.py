"""Small checkpoints for tests, saved by one process or as several would."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moebius.parallel.part import Box, Chunk, Part, Parts
from moebius.trainer.checkpoint.commit import INDEX_NAME, RECORD_NAME, CommitRecord, FileEntry
from moebius.trainer.checkpoint.files import DTYPES
from moebius.trainer.checkpoint.loader import Checkpoint, fill, open_checkpoint
from moebius.trainer.checkpoint.plan import listing, plan, write_index
from moebius.trainer.checkpoint.saver import Saver, sources
from moebius.trainer.checkpoint.storage import LocalStorage, Storage
from moebius.trainer.checkpoint.writer import Staging, Writer
from moebius.trainer.config import CheckpointConfig

Tensors = Mapping[str, Tensor]


def record(step: int, evaluation: float | None = None) -> CommitRecord:
    return CommitRecord(
        step=step,
        position=4 * step,
        tokens=128 * step,
        skipped=[(8, 12)],
        stream={"block": step},
        corpus="hash",
        config={"name": "Möbius"},
        program=["0@1"],
        callbacks={"guard": {"losses": [1.5, 2.0]}},
        evaluation=evaluation,
        files={},
    )


def noise(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Any bytes at all, NaNs of all kinds among them."""
    if dtype is torch.bool:
        return torch.randint(0, 2, tuple(shape), generator=generator).bool()
    size = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).view(tuple(shape))


def some_tensors(seed: int = 0, scale: int = 1) -> dict[str, Tensor]:
    """One of each type, and odd shapes."""
    generator = torch.Generator().manual_seed(seed)
    found = {
        f"model/{name}": noise((3, 5 * scale), dtype, generator) for name, dtype in DTYPES.items()
    }
    found |= {
        "model/turned": noise((7, 4 * scale), torch.float32, generator).T,
        "model/none": torch.empty(0, 3),
        "model/deep": noise((2, 3, 4, 5), torch.bfloat16, generator),
        "optimizer/a/step": torch.tensor(3.0 + seed),
        "optimizer/a/exp_avg": noise((11,), torch.float32, generator)[1:],
        "optimizer/a/flags": noise((9, 2), torch.bool, generator)[::2],
    }
    return found


def parts_of(tensors: Tensors) -> dict[str, Part]:
    return {name: Part.of(tensor) for name, tensor in tensors.items()}


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equal, where NaNs are compared by their bits."""
    return a.shape == b.shape and a.dtype == b.dtype and raw(a) == raw(b)


def raw(tensor: Tensor) -> bytes:
    if not tensor.numel():
        return b""
    return bytes(
        tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).numpy()
    )


def changed(tensors: Tensors) -> dict[str, Tensor]:
    """Others of the same shapes, in memory of their own."""
    return {name: torch.ones_like(tensor) for name, tensor in tensors.items()}


def loaded(checkpoint: Checkpoint, tensors: Tensors) -> dict[str, Tensor]:
    """What a checkpoint has of tensors with these names, read as one process does."""
    found = changed(tensors)
    fill(checkpoint, parts_of(found))
    return found


def assert_holds(storage: Storage, step: int, tensors: Tensors) -> None:
    found = loaded(open_checkpoint(storage, step), tensors)
    for name, tensor in tensors.items():
        assert same_bytes(found[name], tensor), name


def saver_of(storage: Storage, **config: object) -> Saver:
    return Saver(storage, CheckpointConfig.model_validate(config))


def save(storage: Storage, step: int, tensors: Tensors, **config: object) -> None:
    """As one process does."""
    saver = saver_of(storage, **config)
    saver.begin(record(step), parts_of(tensors))
    saver.settle()


def save_shares(
    storage: Storage,
    step: int,
    shares: Sequence[Parts],
    monkeypatch: pytest.MonkeyPatch,
    max_staged: int | None = None,
) -> None:
    """As several processes do, one after the other."""
    index = plan([listing(parts) for parts in shares])
    files: dict[str, FileEntry] = {}
    storage.begin(step)
    monkeypatch.setenv("WORLD_SIZE", str(len(shares)))
    for rank, parts in enumerate(shares):
        monkeypatch.setenv("RANK", str(rank))
        items = sources(index, parts)
        writer = Writer(storage, step, items, Staging(max_staged), lambda phase: None)
        writer.wait(60)
        assert writer.error is None
        files |= writer.entries
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    text = write_index(index)
    files[INDEX_NAME] = FileEntry.of(text.encode())
    sealed = record(step).model_copy(update={"files": files})
    storage.commit(step, {INDEX_NAME: text, RECORD_NAME: sealed.text()})


def random_boxes(shape: Sequence[int], chance: random.Random, cuts: int) -> list[Box]:
    """A tensor cut in two, one of the pieces cut in two, and so on."""
    boxes = [Box((0,) * len(shape), tuple(shape))]
    for _ in range(cuts):
        box = boxes.pop(chance.randrange(len(boxes)))
        dims = [dim for dim, size in enumerate(box.sizes) if size > 1]
        if not dims:
            boxes.append(box)
            continue
        dim = chance.choice(dims)
        first = chance.randrange(1, box.sizes[dim])
        offsets, sizes = list(box.offsets), list(box.sizes)
        sizes[dim] = first
        boxes.append(Box(box.offsets, tuple(sizes)))
        offsets[dim] += first
        sizes[dim] = box.sizes[dim] - first
        boxes.append(Box(tuple(offsets), tuple(sizes)))
    return boxes


def place_of(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))


def random_shares(tensors: Tensors, ranks: int, chance: random.Random) -> list[dict[str, Part]]:
    """Every element on one rank at least, in boxes that are views of the whole."""
    shares: list[dict[str, Part]] = [{} for _ in range(ranks)]
    for name, tensor in tensors.items():
        own: list[list[Box]] = [[] for _ in range(ranks)]
        for box in random_boxes(tensor.shape, chance, chance.randrange(8)):
            for rank in chance.sample(range(ranks), chance.choice([1, 1, min(2, ranks), ranks])):
                own[rank].append(box)
        for rank, boxes in enumerate(own):
            chunks = tuple(Chunk(box, tensor[place_of(box)]) for box in boxes)
            if chunks or chance.random() < 0.5:
                shares[rank][name] = Part(tuple(tensor.shape), tensor.dtype, chunks, tensor)
    return shares


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def local(folder: Path) -> LocalStorage:
    return LocalStorage(folder / "checkpoints")
