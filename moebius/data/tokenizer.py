"""A byte-level BPE: trained on the corpus or loaded from a tokenizer.json."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moebius.data.config import TokenizerConfig
from moebius.errors import DataError

MAX_IDS = 2**31
"""what the widest type of token in a shard holds"""


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, eod_token: str, special_tokens: Sequence[str] = ()
) -> Tokenizer:
    """A lossless byte-level BPE. Raises DataError where the vocabulary cannot hold the alphabet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eod_token, *special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() > vocab_size:
        raise DataError(
            f"data.tokenizer.vocab_size: {vocab_size} cannot hold the byte alphabet and "
            f"{[eod_token, *special_tokens]}, at least {tokenizer.get_vocab_size()} are needed"
        )
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json. Raises DataError where it is missing or not a tokenizer."""
    if not path.is_file():
        raise DataError(f"tokenizer: no file '{path}'")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"tokenizer: cannot read '{path}': {error}") from error
    ids = tokenizer.get_vocab().values()
    if not ids or len(set(ids)) < len(ids) or max(ids) >= MAX_IDS:
        raise DataError(
            f"tokenizer: '{path}' has {len(ids)} tokens with {len(set(ids))} ids up to "
            f"{max(ids, default=0)}, allowed: an id for each, below {MAX_IDS}"
        )
    # A tokenizer.json may cut or pad what it encodes; a corpus must keep every token.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Text that spells a special token stays text: no document can forge an end of document.
    tokenizer.encode_special_tokens = True
    return tokenizer


def count_ids(tokenizer: Tokenizer) -> int:
    """The number of ids a model must have rows for; a vocabulary may have gaps."""
    return int(max(tokenizer.get_vocab().values())) + 1


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """UTF-8 bytes of text that each id stands for, `[V]`; added special tokens stand for none."""
    lengths = np.zeros(count_ids(tokenizer), dtype=np.int64)
    byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
    special = tokenizer.get_added_tokens_decoder()
    for text, token_id in tokenizer.get_vocab().items():
        if token_id in special:
            # Spelled as it is; one that is not special is found in text and stands for it.
            added = special[token_id]
            lengths[token_id] = 0 if added.special else len(added.content.encode())
            continue
        # A byte-level token is spelled with one character per byte.
        lengths[token_id] = len(text if byte_level else tokenizer.decode([token_id]).encode())
    return lengths


def eod_id(tokenizer: Tokenizer, config: TokenizerConfig) -> int:
    """Id of the end-of-document token."""
    token_id = tokenizer.token_to_id(config.eod_token)
    if token_id is None:
        raise DataError(
            f"data.tokenizer.eod_token: '{config.eod_token}' is not in the vocabulary of "
            f"'{config.path}'",
            "name the token that ends a document there",
        )
    if token_id in tokenizer.encode(config.eod_token, add_special_tokens=False).ids:
        raise DataError(
            f"data.tokenizer.eod_token: '{config.eod_token}' is also a token of text",
            "choose one that no text is encoded to, like <|endoftext|>",
        )
    return int(token_id)
