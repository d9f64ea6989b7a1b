"""The pieces a layout is made of, each by itself."""

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moebius.errors import LayoutError
from moebius.kernels.cross_entropy import Teacher, linear_cross_entropy, token_cross_entropy
from moebius.parallel.batch import row_ranges
from moebius.parallel.comm import Group, Traffic
from moebius.parallel.config import ParallelConfig
from moebius.parallel.expert import owners
from moebius.parallel.mesh import Axes, Mesh, partition
from moebius.parallel.messages import Slot, replaced, tensors_of
from moebius.parallel.part import Box, Part
from moebius.parallel.placement import Cut
from moebius.parallel.tensor import VocabularyPart
from tests.parity.forks import run_forked

ALONE = Group("alone", (0,), None, Traffic(), 0)


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 16])
@pytest.mark.parametrize("micro_batch", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_rows_are_shared_out_once_and_in_order(rows: int, micro_batch: int, count: int) -> None:
    shares = [row_ranges(rows, micro_batch, index, count) for index in range(count)]
    assert len({len(share) for share in shares}) == 1, "all take part equally often"
    taken = [row for share in shares for start, end in share for row in range(start, end)]
    assert taken == list(range(rows))
    assert all(end - start <= micro_batch for share in shares for start, end in share)
    sizes = [sum(end - start for start, end in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_the_two_views_of_a_mesh() -> None:
    config = ParallelConfig(pp=2, cp=1, tp=2, ep=2, etp=2, dp_replicate=1)
    axes = Axes.of(config, 16)
    assert axes.dense == {"pp": 2, "rp": 1, "dp_replicate": 1, "dp_shard": 4, "cp": 1, "tp": 2}
    assert axes.expert == {"pp": 2, "rp": 1, "edp": 2, "ep": 2, "etp": 2}
    assert partition(axes.dense, ("tp",))[:2] == [[0, 1], [2, 3]]
    assert partition(axes.dense, ("pp",))[0] == [0, 8]
    assert partition(axes.dense, ("dp_shard",))[:2] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert partition(axes.expert, ("ep", "etp"))[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert partition(axes.expert, ("edp",))[:2] == [[0, 4], [1, 5]]


@pytest.mark.parametrize(
    ("options", "processes", "message"),
    [
        ({"tp": 2, "cp": 2}, 6, r"pp \* rp \* dp_replicate \* cp \* tp = 4 does not divide the 6"),
        (
            {"pp": 2, "ep": 4},
            4,
            r"ep \* etp = 4 does not divide the 2 processes that hold the same",
        ),
        (
            {"rp": 2, "ep": 4},
            4,
            r"ep \* etp = 4 does not divide the 2 processes that hold the same",
        ),
    ],
)
def test_processes_must_fill_the_axes(
    options: dict[str, Any], processes: int, message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        Axes.of(ParallelConfig.model_validate(options), processes)


def test_an_owner_holds_equal_runs_of_each_group_of_experts() -> None:
    ids = torch.tensor([[0, 3, 4], [7, 9, -1]])  # 4 and 4 dispatched experts, 2 others
    owner, number = owners(ids, (4, 4), 2)
    assert owner.tolist() == [[0, 1, 0], [1, -1, -1]]
    assert number.tolist() == [[0, 1, 2], [3, -1, -1]]


def test_a_cut_that_does_not_divide_is_refused() -> None:
    group = Group("two", (0,), None, Traffic(), 0)
    group.size = 2
    with pytest.raises(ValueError, match=r"dimension 0 of \[3, 2\] in 1 x 2"):
        Cut(group, 0).take(torch.zeros(3, 2))


CUTS = [
    [(0, 1, 1)],
    [(1, 1, 1)],
    [(0, 1, 2)],
    [(0, 2, 1)],
    [(1, 3, 1)],
    [(0, 1, 1), (1, 3, 1)],
    [(0, 2, 2), (1, 1, 2)],
]
"""(dimension, blocks, copies) of cuts by 4 processes"""


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("shares", [1, 3, 7])
def test_parts_are_the_elements_that_cuts_and_sharing_out_leave(
    cuts: list[tuple[int, int, int]], shares: int
) -> None:
    """Against numbers that say where they were: boxes hold what a plain cut and slice do, once."""
    shape = (16, 48, 3)
    whole = torch.arange(16 * 48 * 3).view(shape)
    for rank in range(4):
        own = [Cut(_group(rank), *cut) for cut in cuts]
        left = whole
        for cut in own:
            left = cut.take(left)
        size = -(-left.numel() // shares)
        for number in range(shares):
            start = number * size
            flat = left.flatten()[start : start + size]
            given = left.clone() if shares == 1 else flat.clone()
            part = Part.of(given, own, left.shape, start)
            assert part.shape == shape
            seen = []
            for chunk in part.chunks:
                place = tuple(
                    slice(o, o + s) for o, s in zip(chunk.box.offsets, chunk.box.sizes, strict=True)
                )
                assert torch.equal(chunk.tensor, whole[place])
                seen.append(chunk.tensor.flatten().clone())
                chunk.tensor.zero_()
            assert torch.equal(torch.cat(seen).sort()[0], flat.sort()[0])
            assert not given.any(), "chunks are views"


def _group(rank: int) -> Group:
    group = Group("four", (0,), None, Traffic(), 0)
    group.size, group.rank = 4, rank
    return group


def test_what_boxes_have_in_common() -> None:
    """Against sets of elements."""
    generator = random.Random(0)
    for _ in range(300):
        boxes = [
            Box(
                *zip(
                    *[(generator.randrange(4), generator.randrange(1, 4)) for _ in range(2)],
                    strict=True,
                )
            )
            for _ in range(2)
        ]
        elements = [
            {
                (i, j)
                for i in range(b.offsets[0], b.offsets[0] + b.sizes[0])
                for j in range(b.offsets[1], b.offsets[1] + b.sizes[1])
            }
            for b in boxes
        ]
        common = boxes[0].common(boxes[1])
        both = elements[0] & elements[1]
        assert (common.numel if common else 0) == len(both)
        if common:
            grid = torch.zeros(8, 8)
            grid[common.within(Box((0, 0), (8, 8)))] = 1
            assert {tuple(at) for at in grid.nonzero().tolist()} == both


@dataclass(frozen=True)
class Nest:
    """As what flows between stages."""

    first: Tensor
    named: dict[Any, Tensor]
    number: int
    nothing: None = None


def send_around() -> list[Any]:
    mesh = Mesh(ParallelConfig(pp=2))
    channel = mesh.channel([(0, 1), (1, 0)], torch.device("cpu"))
    if mesh.depth.rank == 0:
        twice = torch.ones(2, 3, requires_grad=True) * 2
        ids = torch.tensor([[1, -1]])
        nest = Nest(twice, {"a": twice, 5: ids, "b": torch.zeros(0, 4)}, 7)
        (back,) = channel.send_nest(nest, 1, "there")
        (gradient,) = channel.receive([back], 1)
        channel.settle("there")
        assert not channel.pending
        return [gradient.tolist()]
    nest, leaves = channel.receive_nest(0)
    assert nest.first is nest.named["a"], "a tensor that is there twice travels once"
    (nest.first * 3).sum().backward()
    channel.send([leaves[0].grad], 0, "back")
    channel.wait()
    shapes = [nest.named[5].tolist(), list(nest.named["b"].shape), nest.number, nest.nothing]
    return [*shapes, nest.named[5].requires_grad]


def test_what_flows_between_stages_arrives() -> None:
    sent, received = run_forked(2, send_around)
    assert sent == [[[3.0] * 3] * 2]
    assert received == [[[1, -1]], [0, 4], 7, None, False]


def test_a_nest_is_taken_apart_and_put_together() -> None:
    nest = Nest(torch.ones(2), {"a": torch.zeros(3)}, 1)
    assert [len(t) for t in tensors_of(nest)] == [2, 3]
    apart = replaced(nest, Tensor, lambda tensor: Slot(len(tensor)))
    assert apart == Nest(Slot(2), {"a": Slot(3)}, 1)  # type: ignore[arg-type]


def split_vocabulary(temperature: float) -> None:
    """The same losses and gradients from two parts of the vocabulary as from the whole."""
    mesh = Mesh(ParallelConfig(tp=2))
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(7, 6, dtype=torch.float64, generator=generator) for _ in range(2)]
    weight = torch.randn(10, 6, dtype=torch.float64, generator=generator)
    taught = torch.randn(7, 5, dtype=torch.float64, generator=generator)
    lesson = torch.randn(10, 5, dtype=torch.float64, generator=generator)
    labels = torch.tensor([0, 4, 5, 9, 2, 7, 5])
    rows = slice(mesh.rank * 5, mesh.rank * 5 + 5)
    results = []
    for part, vocabulary in ((slice(None), None), (rows, VocabularyPart(mesh.tp, 10))):
        states = [h.clone().requires_grad_() for h in hidden]
        head = weight[part].clone().requires_grad_()
        losses = linear_cross_entropy(
            states,
            head,
            labels,
            [1.0, 0.5],
            [0.3, 0.7],
            Teacher(taught, lesson[part], temperature),
            3,
            vocabulary,
        )
        losses.total.backward()
        alone = token_cross_entropy(hidden[0], head.detach(), labels, 3, vocabulary)
        gradients = [state.grad for state in states]
        if vocabulary is not None:
            gradients = [mesh.tp.all_reduce(g) for g in gradients if g is not None]
        results.append([losses.ce_X, losses.kl_X, alone, *gradients, head.grad])
    expected, got = results
    assert expected[-1] is not None
    expected[-1] = expected[-1][rows]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_cut_vocabulary_has_the_losses_of_the_whole(temperature: float) -> None:
    run_forked(2, split_vocabulary, temperature)
