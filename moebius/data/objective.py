"""Training objectives: what a window of tokens is turned into before it is learned.

Each document in a window, or the piece of one that the window holds, is left as it is or rearranged
in place to the same number of tokens, so ends of documents stay where they are. Sentinels take the
room of the last tokens of the text, which are dropped. A document stays as it is where the
sentinels would outnumber the text that remains.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moebius.config import ConfigNode
from moebius.errors import DataError


class CausalObjective(ConfigNode):
    """Next-token prediction of the text as it is."""

    kind: Literal["causal"] = "causal"


class FimObjective(ConfigNode):
    """Fill-in-the-middle (arXiv 2207.14255): the middle of a document is moved to its end."""

    kind: Literal["fim"] = "fim"
    rate: float = Field(0.5, ge=0, le=1)
    """share of the documents that are rearranged; the others stay causal"""
    spm_rate: float = Field(0.5, ge=0, le=1)
    """share of the rearranged ones in the order suffix, prefix, middle"""
    prefix_token: str = "<|fim_prefix|>"
    """sentinel before the prefix"""
    suffix_token: str = "<|fim_suffix|>"
    """sentinel before the suffix"""
    middle_token: str = "<|fim_middle|>"
    """sentinel before the middle"""


class SpanObjective(ConfigNode):
    """Masked spans, told after the text they were taken from (CodeGen2, arXiv 2305.02309)."""

    kind: Literal["span"] = "span"
    rate: float = Field(0.5, ge=0, le=1)
    """share of the documents with masked spans; the others stay causal"""
    mask_ratio: float = Field(0.15, gt=0, lt=1)
    """share of a document's tokens that is masked"""
    mean_span: float = Field(3.0, ge=1)
    """about the mean length of a masked span; longer where `mask_tokens` are too few for it"""
    mask_tokens: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = tuple(
        f"<|mask_{number}|>" for number in range(1, 9)
    )
    """sentinels of the first, second, ... span of a document, which has at most that many"""
    separator_token: str = "<|sep|>"
    """sentinel between the text and its masked spans"""
    end_token: str = "<|eom|>"
    """sentinel after each masked span"""


Objective = Annotated[CausalObjective | FimObjective | SpanObjective, Field(discriminator="kind")]
"""what is learned from a window of tokens"""


def sentinels(objective: Objective) -> tuple[str, ...]:
    """The special tokens an objective needs, in a fixed order."""
    return tuple(token for _, token in _named_sentinels(objective))


def build_transform(
    objective: Objective,
    token_id: Callable[[str], int | None],
    eod_id: int,
    seed: int,
) -> "Transform | None":
    """The transform of an objective; None for the causal one, which changes nothing.

    `token_id` gives the id of a token, None where the vocabulary lacks it. Raises DataError for a
    sentinel that is not in the vocabulary or has another role.
    """
    if isinstance(objective, CausalObjective):
        return None
    roles = {eod_id: "the end-of-document token"}
    ids = []
    for field, token in _named_sentinels(objective):
        number = token_id(token)
        if number is None:
            raise DataError(
                f"data.objective.{field}: '{token}' is not in the tokenizer's vocabulary",
                "add it to data.tokenizer.special_tokens, or name one the tokenizer has",
            )
        if number in roles:
            raise DataError(
                f"data.objective.{field}: '{token}' is already {roles[number]}",
                "each sentinel needs a token of its own",
            )
        roles[number] = f"a token of data.objective.{field}"
        ids.append(number)
    return Transform(objective, ids, eod_id, seed)


class Transform:
    """Windows of tokens to what an objective learns from them: the same number of tokens.

    A pure function of (window, sample, seed). `sentinel_ids` are those of `sentinels(objective)`.
    """

    def __init__(
        self,
        objective: FimObjective | SpanObjective,
        sentinel_ids: Sequence[int],
        eod_id: int,
        seed: int,
    ) -> None:
        self.objective = objective
        self.sentinel_ids = tuple(sentinel_ids)
        self.eod_id = eod_id
        self.seed = seed

    def __call__(self, window: NDArray[np.int64], sample: int) -> NDArray[np.int64]:
        """A new window `[L]`, given one `[L]` and the number of its sample in the stream."""
        transformed = window.copy()
        ends = [*np.flatnonzero(window == self.eod_id).tolist(), len(window)]
        start = 0
        for number, end in enumerate(ends):
            # The stream's shuffle hashes keys of the same shape; the word keeps the two apart.
            draws = Draws(f"objective/{self.seed}/{sample}/{number}")
            tokens = self._rearranged(window[start:end], draws)
            if tokens is not None:
                transformed[start:end] = tokens
            start = end + 1
        return transformed

    def _rearranged(self, part: NDArray[np.int64], draws: "Draws") -> list[int] | None:
        if isinstance(self.objective, FimObjective):
            return _fill_in_middle(part, self.objective, self.sentinel_ids, draws)
        return _mask_spans(part, self.objective, self.sentinel_ids, draws)


class Draws:
    """Random numbers that are a function of a key and of how many were drawn before.

    Made of a hash and not of a library's generator, so they never change: not with the platform,
    not with a version.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self._count = 0

    def bits(self) -> int:
        """The next 64 random bits."""
        text = f"{self._key}/{self._count}"
        self._count += 1
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")

    def chance(self, probability: float) -> bool:
        """True with such a probability: always for 1, never for 0."""
        return self.bits() < probability * 2**64

    def below(self, bound: int) -> int:
        """One of `range(bound)`, all alike but for a bias of less than bound / 2^64."""
        return self.bits() * bound >> 64

    def subset(self, size: int, bound: int) -> list[int]:
        """`size` different ones of `range(bound)`, sorted; all subsets alike.

        Floyd's algorithm (Bentley & Floyd 1987): one draw for each number.
        """
        chosen: set[int] = set()
        for top in range(bound - size, bound):
            number = self.below(top + 1)
            chosen.add(top if number in chosen else number)
        return sorted(chosen)


def _named_sentinels(
    objective: Objective,
) -> Iterator[tuple[str, str]]:
    """Field and token of each sentinel."""
    if isinstance(objective, FimObjective):
        yield "prefix_token", objective.prefix_token
        yield "suffix_token", objective.suffix_token
        yield "middle_token", objective.middle_token
    elif isinstance(objective, SpanObjective):
        for token in objective.mask_tokens:
            yield "mask_tokens", token
        yield "separator_token", objective.separator_token
        yield "end_token", objective.end_token


def _fill_in_middle(
    part: NDArray[np.int64], objective: FimObjective, ids: Sequence[int], draws: Draws
) -> list[int] | None:
    """Prefix, suffix, middle (PSM) or suffix, prefix, middle (SPM); None where it stays causal.

    The text is cut at two places, each as likely as any. PSM is `<pre> prefix <suf> suffix <mid>
    middle`. Of the two SPM variants of arXiv 2207.14255 this is the plain one, `<suf> suffix <pre>
    prefix <mid> middle`, and not `<pre> <suf> suffix <mid> prefix middle`.
    """
    size = len(part) - len(ids)
    if size < len(ids) or not draws.chance(objective.rate):
        return None
    text: list[int] = part[:size].tolist()
    first, second = sorted((draws.below(size + 1), draws.below(size + 1)))
    prefix_id, suffix_id, middle_id = ids
    prefix = [prefix_id, *text[:first]]
    middle = [middle_id, *text[first:second]]
    suffix = [suffix_id, *text[second:]]
    if draws.chance(objective.spm_rate):
        return suffix + prefix + middle
    return prefix + suffix + middle


def _mask_spans(
    part: NDArray[np.int64], objective: SpanObjective, ids: Sequence[int], draws: Draws
) -> list[int] | None:
    """Text with masked spans, a separator, the spans; None where it stays causal.

    The layout of arXiv 2305.02309, for two spans `a <mask_1> b <mask_2> c <sep> <mask_1> span_1
    <eom> <mask_2> span_2 <eom>`. Of all ways to mask so many tokens in so many spans with text
    between any two, each is as likely as any.
    """
    *mask_ids, separator_id, end_id = ids
    wanted = round(objective.mask_ratio * len(part) / objective.mean_span)
    num_spans = min(max(wanted, 1), len(mask_ids))
    num_sentinels = 1 + 3 * num_spans
    size = len(part) - num_sentinels
    if size < num_sentinels or not draws.chance(objective.rate):
        return None
    text: list[int] = part[:size].tolist()
    head: list[int] = []
    tail = [separator_id]
    done = 0
    spans = _spans(size, num_spans, objective, draws)
    for mask_id, (start, end) in zip(mask_ids[:num_spans], spans, strict=True):
        head += [*text[done:start], mask_id]
        tail += [mask_id, *text[start:end], end_id]
        done = end
    return head + text[done:] + tail


def _spans(
    size: int, count: int, objective: SpanObjective, draws: Draws
) -> Iterator[tuple[int, int]]:
    """Start and end of `count` masked spans of a text of `size` tokens, no two of them adjacent."""
    # A token for each span, and one between any two.
    masked = min(max(round(objective.mask_ratio * size), count), size - (count - 1))
    ends = [*(cut + 1 for cut in draws.subset(count - 1, masked - 1)), masked]
    # The number of visible tokens before each span; different ones have a token between them.
    gaps = draws.subset(count, size - masked + 1)
    before = 0
    for gap, end in zip(gaps, ends, strict=True):
        yield gap + before, gap + end
        before = end
