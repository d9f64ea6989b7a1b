"""The order of an epoch: which sample comes at which place, as a pure function."""

import hashlib
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from moebius.config import ConfigNode


class GlobalShuffle(ConfigNode):
    """Any sample may come next: best mixed, for corpora on fast local disks."""

    kind: Literal["global"] = "global"


class BlockShuffle(ConfigNode):
    """Neighbouring samples stay near each other in time, so that few shards are in use at once: for
    corpora at URLs or on disks that dislike jumps."""

    kind: Literal["blocks"]
    run: PositiveInt = 4096
    """neighbouring samples that come into one block"""
    block: PositiveInt = 65_536
    """samples that are shuffled among each other; they come from about block / run places"""


class NoShuffle(ConfigNode):
    """Samples in the order of the corpus."""

    kind: Literal["none"]


Shuffle = Annotated[GlobalShuffle | BlockShuffle | NoShuffle, Field(discriminator="kind")]


def sample_at(place: int, size: int, shuffle: Shuffle, key: str) -> int:
    """The sample at a place of an epoch of `size` samples; a bijection of `range(size)`.

    Nothing is kept in memory, however many samples there are.
    """
    if isinstance(shuffle, NoShuffle):
        return place
    if isinstance(shuffle, GlobalShuffle):
        return permuted(place, size, key)
    # Shuffled inside its block, places are dealt to runs, of which each is anywhere in the corpus.
    first = place - place % shuffle.block
    inside = min(shuffle.block, size - first)
    place = first + permuted(place - first, inside, f"{key}/block/{first}")
    run, step = divmod(place, shuffle.run)
    whole_runs, rest = divmod(size, shuffle.run)
    if run < whole_runs:
        run = permuted(run, whole_runs, f"{key}/runs")
    # The runs begin elsewhere in each epoch: else the samples that fill none would always be last.
    shift = permuted(0, size, f"{key}/shift") if rest else 0
    return (run * shuffle.run + step + shift) % size


def permuted(number: int, size: int, key: str) -> int:
    """Image of `number` under a pseudo-random permutation of `range(size)`.

    A Feistel network on the smallest even number of bits that holds `size`, walked until it lands
    inside (Black & Rogaway 2002): no table in memory, however many samples there are.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = number >> half, number & mask
        for turn in range(4):
            digest = hashlib.blake2b(f"{key}/{turn}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & mask)
        number = (left << half) | right
        if number < size:
            return number
