"""A byte-level BPE: trained on the corpus or loaded from a tokenizer.json."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moebius.data.config import TokenizerConfig
from moebius.errors import DataError


def train_tokenizer(texts: Iterable[str], vocab_size: int, eod_token: str) -> Tokenizer:
    """A lossless byte-level BPE. Raises DataError where the vocabulary cannot hold the alphabet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eod_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() > vocab_size:
        raise DataError(
            f"data.tokenizer.vocab_size: {vocab_size} cannot hold the byte alphabet and "
            f"'{eod_token}', at least {tokenizer.get_vocab_size()} are needed"
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
    # Text that spells a special token stays text: no document can forge an end of document.
    tokenizer.encode_special_tokens = True
    return tokenizer


def eod_id(tokenizer: Tokenizer, config: TokenizerConfig) -> int:
    """Id of the end-of-document token."""
    token_id = tokenizer.token_to_id(config.eod_token)
    if token_id is None:
        raise DataError(
            f"data.tokenizer.eod_token: '{config.eod_token}' is not in the vocabulary of "
            f"'{config.path}'",
            "name the token that ends a document there",
        )
    return int(token_id)
