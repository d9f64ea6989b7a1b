"""Everything a layer must know that depends on where and for which tokens it is being used.

A layer object serves many visits, so none of this lives in modules: it arrives as an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moebius.errors import LayoutError
from moebius.kernels.attention import Sight, document_begins, document_mask, seen_mask
from moebius.kernels.depth_select import take_rows
from moebius.kernels.registry import PLAIN, Kernels
from moebius.model.extent import Extent
from moebius.model.ledger import Ledger
from moebius.model.moe.replay import RoutingTable
from moebius.model.program import Site, Visit
from moebius.model.spread import ALONE, Spread

if TYPE_CHECKING:
    from moebius.model.generation.cache import KVCache

MAX_ROW = 1 << 24
"""longest row: a token is numbered `sample * MAX_ROW + place in the row`"""


@dataclass(frozen=True)
class TokenContext:
    """Which tokens are present: rows as they are, or rows from which tokens have been taken.

    Always of whole rows, also where several processes share them, see `Spread`.
    """

    segment_ids_BS: Tensor
    """document of each token, int"""
    cos_BSC: Tensor
    """rotary tables at each token's original position, see `rope_tables`"""
    sin_BSC: Tensor
    sample_ids_B: Tensor
    """which sample of the training stream each row is, int64"""
    place_BS: Tensor
    """where in its full row each token stands, int64, -1 for an empty slot"""
    row_length: int
    """slots of the full row"""
    valid_BS: Tensor | None = None
    """false for empty slots; None: every slot holds a token"""
    expected: float | None = None
    """tokens that the schedule foresees, where their number depends on the data: losses of routers
    inside are then sums over tokens divided by this, or they would depend on how a batch is cut"""
    row: TokenContext | None = None
    """the full rows that tokens were taken from; None: these are the full rows"""
    spread: Spread = ALONE
    """which of the slots are whose"""
    slots_B: Tensor | None = None
    """where in the cache each row's earlier tokens are, int64; None without a cache"""

    @classmethod
    def of_rows(
        cls,
        segment_ids_BS: Tensor,
        cos_BSC: Tensor,
        sin_BSC: Tensor,
        sample_ids_B: Tensor,
        spread: Spread = ALONE,
        slots_B: Tensor | None = None,
    ) -> TokenContext:
        """The context of full rows, in the order of the spread."""
        length = segment_ids_BS.shape[1]
        place = torch.arange(length, device=segment_ids_BS.device).expand_as(segment_ids_BS)
        tokens = cls(
            segment_ids_BS,
            cos_BSC,
            sin_BSC,
            sample_ids_B,
            place,
            length,
            spread=spread,
            slots_B=slots_B,
        )
        return tokens if spread.order_BS is None else tokens.take(spread.order_BS)

    def take(self, index_BK: Tensor, expected: float | None = None) -> TokenContext:
        """The context of the tokens at `index` of the slots, -1 for an empty slot; those of a
        document in their order."""
        valid_BK = index_BK >= 0
        documents_BK = self.segment_ids_BS.gather(1, index_BK.clamp(min=0))
        # An empty slot belongs to the document before it, so that none seems to begin there.
        slot_K = torch.arange(index_BK.shape[1], device=index_BK.device)
        last_BK = (slot_K * valid_BK).cummax(dim=1).values
        documents_BK = documents_BK.masked_fill(~valid_BK, -1).gather(1, last_BK)
        return TokenContext(
            segment_ids_BS=documents_BK,
            cos_BSC=take_rows(self.cos_BSC, index_BK),
            sin_BSC=take_rows(self.sin_BSC, index_BK),
            sample_ids_B=self.sample_ids_B,
            place_BS=self.places(index_BK),
            row_length=self.row_length,
            valid_BS=valid_BK,
            expected=expected,
            row=self.row or self,
            spread=self.spread,
            slots_B=self.slots_B,
        )

    @property
    def num_slots(self) -> int:
        """Slots of a row, empty ones included."""
        return self.place_BS.shape[1]

    @property
    def num_row_tokens(self) -> int:
        """Tokens of the full rows."""
        return len(self.place_BS) * self.row_length

    @property
    def extent(self) -> Extent:
        """How much a visit works on."""
        slots = self.place_BS.numel()
        pairs = self.spread.pairs(len(self.place_BS), self.num_slots)
        return Extent(slots, pairs, slots * self.row_length)

    def places(self, index_BK: Tensor) -> Tensor:
        """Where in their full rows the tokens at `index` of the slots stand; -1 for empty slots."""
        if self.valid_BS is None:
            return index_BK
        return self.place_BS.gather(1, index_BK.clamp(min=0)).masked_fill(index_BK < 0, -1)

    def joined(self, whole_BS: Tensor, empty: int) -> Tensor:
        """Of something that is known for whole rows, along its last dimension, the slots that
        `Spread.join` brings."""
        return _joined(whole_BS, self.spread, self.num_slots, empty)

    @property
    def attention_mask_BQS(self) -> Tensor:
        """Whom of the joined tokens each token of the part may look at, see `document_mask`; made
        once for all layers of a pass."""
        return self.sight.mask_BSJ

    def prepare(self) -> None:
        """Make what all layers need before compiled code asks for it, which cannot take the lock
        that guards a cached property."""
        for tensor in (*self.rope_BQC, self.sight.mask_BSJ):
            assert tensor is not None

    @cached_property
    def sight(self) -> Sight:
        """Whom each token of the part may look at of the joined ones."""
        segments_BS, spread = self.segment_ids_BS, self.spread
        # Nothing of `self`: a cycle would keep masks until the collector comes.
        make_mask = partial(_attention_mask, segments_BS, self.valid_BS, spread)
        return Sight(make_mask, segments_BS if spread is ALONE else None)

    @cached_property
    def rope_BQC(self) -> tuple[Tensor, Tensor]:
        """The rotary tables of the part's tokens."""
        return self.spread.part(self.cos_BSC), self.spread.part(self.sin_BSC)

    def row_mask_BQL(self, present_BL: Tensor) -> Tensor:
        """Which tokens of the full rows each token of the part may look at, of those that have left
        keys."""
        row, part = self.row or self, self.spread.part
        return seen_mask(
            part(self.place_BS), part(self.segment_ids_BS), row.segment_ids_BS, present_BL
        )

    @cached_property
    def global_ids_T(self) -> Tensor:
        """A number for each token that no layout changes, int64; randomness is keyed by it."""
        return (self.sample_ids_B.unsqueeze(1) * MAX_ROW + self.place_BS).flatten()

    @cached_property
    def document_start_BS(self) -> Tensor:
        """For each token the slot of its document's first present token in this row."""
        slot = torch.arange(self.segment_ids_BS.shape[1], device=self.segment_ids_BS.device)
        return (slot * document_begins(self.segment_ids_BS)).cummax(dim=1).values


def _attention_mask(segments_BS: Tensor, valid_BS: Tensor | None, spread: Spread) -> Tensor:
    mask_BQS = spread.part(document_mask(segments_BS, valid_BS))
    return _joined(mask_BQS, spread, segments_BS.shape[1], empty=False)


def _joined(whole_BS: Tensor, spread: Spread, num_slots: int, empty: int) -> Tensor:
    slots_BJ = spread.joined_slots(num_slots)
    if slots_BJ is None:
        return whole_BS
    slots = slots_BJ.unsqueeze(1) if whole_BS.dim() == 3 else slots_BJ
    index = slots.expand(*whole_BS.shape[:-1], -1)
    return whole_BS.gather(-1, index.clamp(min=0)).masked_fill(index < 0, empty)


Mode = Literal["topk", "threshold"]
"""How expert-choice depth routers select. topk: the k best, as published and trained, comparing a
token with later ones. threshold: each token by its own score, causal, the only mode for generation.
Where tokens choose their depth the two are the same."""


Recompute = Literal["none", "selective", "full"]
"""selective: the middle of attention and feed-forward, which takes much room and little time
(Korthikanti et al. 2022, arXiv 2205.05198); full: whole sublayers"""


def in_full_rows(ids_BSK: Tensor, tokens: TokenContext) -> Tensor:
    """What is known of present tokens at the places where these stand in their full rows, -1
    elsewhere."""
    width = tokens.row_length + 1
    full = ids_BSK.new_full((len(ids_BSK), width, ids_BSK.shape[2]), -1)
    # Empty slots have place -1: the extra column, which is cut off.
    place_BS1 = tokens.place_BS.remainder(width).unsqueeze(-1)
    return full.scatter(1, place_BS1.expand_as(ids_BSK), ids_BSK)[:, :-1]


def _nobody(phase: str) -> None:
    """Nobody wants to know how a step goes on."""


@dataclass(frozen=True)
class StepContext:
    """What is the same for every layer of one forward pass."""

    mode: Mode
    ledger: Ledger
    step: int = 0
    """optimizer steps done; what is scheduled or random is a function of it"""
    seed: int = 0
    """of everything random in the forward pass"""
    training: bool = False
    """whether noise, capacities and sampling are on"""
    recompute: Recompute = "none"
    """which activations are computed again in the backward pass"""
    micro_batch: int = 0
    """number of the micro-batch in its step"""
    replay: Mapping[str, RoutingTable] = field(default_factory=dict)
    """decisions that selectors of kind `replay` repeat, by the path they name"""
    cache: KVCache | None = None
    """keys and values of earlier tokens, read and extended; for generation"""
    kernels: Kernels = PLAIN
    """how operations are computed"""
    compile: bool = False
    """whether the computations of sublayers are compiled; routers, which keep the books, are not"""
    decisions: dict[tuple[Site, str], Tensor] | None = None
    """what routers have chosen, where whole visits are computed again: filled by the first run and
    repeated by the second, in which rounding may be another"""

    mark: Callable[[str], object] = _nobody
    """told `forward` and `backward` where such work of a training step begins, and `merge` where
    processes put together what they have"""

    def decide(self, site: Site, what: str, choose: Callable[[], Tensor]) -> Tensor:
        """A choice of a router, or the one that it has made before."""
        if self.decisions is None:
            return choose()
        if (site, what) not in self.decisions:
            self.decisions[site, what] = choose()
        return self.decisions[site, what]

    def run(self, function: Callable[..., Any], *inputs: Tensor) -> Any:
        """A sublayer, `function(*inputs)` of tensors; with `full` its activations are not kept.

        Routers decide outside such a function and hand their decision in: what is computed again
        is the same, and statistics are taken once.
        """
        if self.compile:
            function = compiled(function)
        return _call(function, inputs, again=self.recompute == "full")

    def run_core(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """The middle of a sublayer, without weights; with `selective` its activations are not
        kept."""
        return _call(function, inputs, again=self.recompute == "selective")


@dataclass(frozen=True)
class DepthContext:
    """Where in the unrolled depth a layer is being used, for which tokens, and in which pass.

    In training and evaluation a layer is used at one visit at a time. Generation runs rows that
    stand at different passes of a loop together: then `parts` are the contexts of consecutive rows
    that stand at the same visit, and what depends on the visit goes through `by_visit`.
    """

    visit: Visit
    tokens: TokenContext
    step: StepContext
    shared: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    """modules that several layers use, by name; they belong to the decoder"""
    parts: tuple[DepthContext, ...] = ()

    def by_visit(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """`function(context, *inputs)` for the rows of each visit, the results joined by row.

        Inputs and results are tensors, or have `rows` and `join` as Carry has, or tuples of such,
        or None.
        """
        if not self.parts:
            return function(self, *inputs)
        results, start = [], 0
        sizes = [len(part.tokens.place_BS) for part in self.parts]
        for part, size in zip(self.parts, sizes, strict=True):
            own = (_rows(value, start, start + size) for value in inputs)
            results.append(function(part, *own))
            start += size
        return _join(results, sizes)

    def at(self, visits: Sequence[Visit]) -> DepthContext:
        """The context of another layer: its visits in the same order as the present ones."""
        if not self.parts:
            return replace(self, visit=visits[0])
        parts = tuple(
            replace(part, visit=visit) for part, visit in zip(self.parts, visits, strict=True)
        )
        return replace(self, visit=visits[0], parts=parts)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as `torch.compile` makes it, in one piece; made once for all layers of a kind.

    Raises LayoutError where it cannot be made in one piece.
    """
    # Only here: to import the compiler takes as long as to import torch.
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import InductorError

    in_one_piece = torch.compile(function, fullgraph=True)

    def run(*inputs: Any) -> Any:
        try:
            return in_one_piece(*inputs)
        except (TorchDynamoException, FailOnRecompileLimitHit, InductorError) as error:
            reason = str(error).splitlines()[0]
            raise LayoutError(
                f"kernels.compile: true, but a layer of this model cannot be compiled: {reason}",
                "kernels.compile=false",
            ) from None

    return run


def _call(function: Callable[..., Any], inputs: tuple[Any, ...], again: bool) -> Any:
    if not again or not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def _rows(value: Any, start: int, end: int) -> Any:
    """Some rows of an input of `by_visit`."""
    if value is None:
        return None
    return value[start:end] if isinstance(value, Tensor) else value.rows(start, end)


def _join(results: Sequence[Any], sizes: Sequence[int]) -> Any:
    """The results of all parts as one."""
    first = results[0]
    if isinstance(first, Tensor):
        return torch.cat(list(results))
    if isinstance(first, tuple):
        return tuple(_join(column, sizes) for column in zip(*results, strict=True))
    return None if first is None else first.join(results, sizes)
