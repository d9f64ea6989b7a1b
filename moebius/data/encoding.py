"""Text to token ids: by tiktoken where it gives the ids of tokenizers, by tokenizers elsewhere.

tiktoken is several times as fast. Which texts it may encode is proven, not sampled:

*Pieces.* The patterns that cut a text into pieces see a character only through the classes it is
in. Each library has a regular-expression engine of its own, so a character is trusted only if
both put it into the same of `CLASSES`; texts with another one go to tokenizers.

*Merges.* tokenizers merges neighbours that its list of merges holds, first in the list first;
tiktoken merges any whose concatenation is a token that it knows, lowest id first; both take the
leftmost of equals. Let the run of a token be the states through which tokenizers takes its bytes,
were they a piece. Suppose both have done the same so far, and the concatenation of the neighbours
(x, y) is a token t. No merge has crossed the ends of t, so those inside are the beginning of its
run, and (x, y) is its only state of two tokens.

- The run of t ends in t: tokenizers merges (x, y), and t is never made of other neighbours.
- It ends in two tokens: tokenizers does not merge (x, y), so tiktoken must not know t.
- It ends in three or more: there is no such state, so neither ever makes t by a merge.

Hence both do the same next if ids never fall along the list of merges. tiktoken also looks up a
whole piece before it merges, which gives what the run gives in the first case. In the others it may
know t only if tokenizers looks up pieces, too (`ignore_merges`).
"""

import itertools
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

GPT2_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # of ByteLevel
)
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
PATTERNS = (GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN)
"""patterns of pieces that both libraries read alike; each gives every character to a piece"""
CLASSES = (
    *(r"\s", r"\S", r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]", r"[^\r\n\p{L}\p{N}]", r"[\r\n]"),
    *(f"(?i:{letter})" for letter in "'strevmld"),
)
"""what the patterns are made of, besides characters that stand for themselves"""
SPACE_BLOCK = 1_000
"""length of a blank block that goes to tokenizers; tiktoken fails on a million spaces, and some
versions of it take time quadratic in their number"""
UNUSED_TOKEN = "<|none|>"
"""the special token of tiktoken, which without any finds an empty one everywhere, slowly"""


class Encoder:
    """Encodes texts to the ids that `tokenizer` gives them; `fast` is None if it does it all.

    tiktoken runs in the calling thread, tokenizers in as many as TOKENIZERS_PARALLELISM allows.
    An encoder pickles as its tokenizer and is built anew when it is read.
    """

    def __init__(self, tokenizer: Tokenizer, fast: tiktoken.Encoding | None) -> None:
        self.tokenizer, self.fast = tokenizer, fast
        self.characters = CharacterCheck()
        self.characters.check(map(chr, range(128)))
        if self.characters.unlike:
            self.fast = None

    def encode(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        """Ids of each text, without special tokens. Raises TypeError on a lone surrogate."""
        if self.fast is None:
            return self._by_tokenizers(texts)
        self.characters.check(set().union(*(text for text in texts if not text.isascii())))
        suits = [self._suits(text) for text in texts]
        rest = [text for text, suit in zip(texts, suits, strict=True) if not suit]
        others = iter(self._by_tokenizers(rest))
        return [
            self.fast.encode_to_numpy(text, disallowed_special=()) if suit else next(others)
            for text, suit in zip(texts, suits, strict=True)
        ]

    def _suits(self, text: str) -> bool:
        """Whether tiktoken may encode a text whose characters have been checked."""
        return (
            (text.isascii() or self.characters.all_alike(text))
            # Some versions of tiktoken find special tokens unasked.
            and UNUSED_TOKEN not in text
            and not _has_long_blank(text)
        )

    def _by_tokenizers(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def __reduce__(self) -> tuple[object, ...]:
        # A Tokenizer forgets `encode_special_tokens` when it is pickled.
        return _rebuild, (self.tokenizer.to_str(), self.tokenizer.encode_special_tokens)


def build_encoder(tokenizer: Tokenizer) -> Encoder:
    """The encoder of `tokenizer`, which must not be changed afterwards."""
    return Encoder(tokenizer, _to_tiktoken(tokenizer))


def _rebuild(content: str, encode_special_tokens: bool) -> Encoder:
    tokenizer = Tokenizer.from_str(content)
    tokenizer.encode_special_tokens = encode_special_tokens
    return build_encoder(tokenizer)


class CharacterCheck:
    """Sorts characters into those that both engines put into the same classes, and others."""

    def __init__(self) -> None:
        self.alike: set[str] = set()
        self.unlike: set[str] = set()
        self._engines = [(_TiktokenClass(name), _TokenizersClass(name)) for name in CLASSES]

    def check(self, characters: Iterable[str]) -> None:
        """Learn about those of the characters that are new."""
        new = set(characters) - self.alike - self.unlike
        if not new:
            return
        # Lone surrogates are no text; tokenizers says so, tiktoken would replace them.
        unlike = {character for character in new if "\ud800" <= character <= "\udfff"}
        text = "".join(new - unlike)
        for one, other in self._engines:
            unlike |= one.members(text) ^ other.members(text)
        self.unlike |= unlike
        self.alike |= new - unlike

    def all_alike(self, text: str) -> bool:
        """Whether a text, all of whose characters have been checked, has none that is unlike."""
        return not self.unlike or self.unlike.isdisjoint(text)


class _TiktokenClass:
    """Finds members of a class: tiktoken encodes only what its pattern finds, here to bytes."""

    def __init__(self, pattern: str) -> None:
        ranks = {bytes([value]): value for value in range(256)}
        self._encoding = tiktoken.Encoding(
            pattern, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )

    def members(self, text: str) -> set[str]:
        return set(bytes(self._encoding.encode_ordinary(text)).decode())


class _TokenizersClass:
    """Finds members of a class: tokenizers drops from a text what the pattern finds."""

    def __init__(self, pattern: str) -> None:
        self._split = pre_tokenizers.Split(Regex(pattern), "removed")

    def members(self, text: str) -> set[str]:
        return set(text).difference(*(piece for piece, _ in self._split.pre_tokenize_str(text)))


def _to_tiktoken(tokenizer: Tokenizer) -> tiktoken.Encoding | None:
    """The same encoding in tiktoken; None where it is not proven to be the same."""
    spec = json.loads(tokenizer.to_str())
    if any(spec[key] is not None for key in ("normalizer", "truncation", "padding")):
        return None
    # Added tokens are never found in text if all are special and those are taken for text.
    special = all(token["special"] for token in spec["added_tokens"])
    if spec["added_tokens"] and not (special and tokenizer.encode_special_tokens):
        return None
    pattern = _pattern(spec["pre_tokenizer"])
    ranks = _ranks(spec["model"], tokenizer.get_vocab(with_added_tokens=False))
    if pattern is None or ranks is None:
        return None
    unused = {UNUSED_TOKEN: max(ranks.values()) + 1}
    return tiktoken.Encoding(
        "tokenizer.json", pat_str=pattern, mergeable_ranks=ranks, special_tokens=unused
    )


def _pattern(pre_tokenizer: object) -> str | None:
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return GPT2_PATTERN
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": str(pattern)},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        } if pattern in PATTERNS:
            return pattern
    return None


def _ranks(model: dict[str, Any], vocab: dict[str, int]) -> dict[bytes, int] | None:
    """Ids of the tokens that tiktoken may make; None where no such set gives the same ids."""
    unsupported = ("dropout", "unk_token", "byte_fallback")
    affixes = ("continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or any(model[key] for key in (*unsupported, *affixes)):
        return None
    spelling = byte_spelling()
    # Where tokens share an id the model may spell its merges wrongly.
    if not spelling.keys() <= vocab.keys() or len(set(vocab.values())) < len(vocab):
        return None
    merges = [(left, right) for left, right in model["merges"]]
    results = [vocab[left + right] for left, right in merges]
    if any(later < earlier for earlier, later in itertools.pairwise(results)):
        return None
    bpe = models.BPE(vocab, merges)
    ranks = {}
    for token, token_id in vocab.items():
        if not spelling.keys() >= set(token):
            continue  # it is not made of bytes
        run = [part.value for part in bpe.tokenize(token)]
        if run != [token]:
            if not model["ignore_merges"]:
                continue  # tokenizers never makes it, nor does tiktoken if it is not told of it
            if len(run) < 3:
                return None
        ranks[bytes(spelling[character] for character in token)] = token_id
    return ranks


def byte_spelling() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(value): value for value in printable} | {
        chr(256 + index): value for index, value in enumerate(others)
    }


def _has_long_blank(text: str) -> bool:
    """Whether an aligned block is blank, as one is in any run of spaces of two blocks' length."""
    starts = range(0, len(text) - SPACE_BLOCK + 1, SPACE_BLOCK)
    return any(text[start : start + SPACE_BLOCK].isspace() for start in starts)
