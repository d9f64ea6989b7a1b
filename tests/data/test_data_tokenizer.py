"""The tokenizer loses nothing and cannot be tricked."""

import sysconfig
from pathlib import Path

import pytest

from moebius.data.config import TokenizerConfig
from moebius.data.tokenizer import (
    count_ids,
    eod_id,
    load_tokenizer,
    token_bytes,
    train_tokenizer,
)
from moebius.errors import DataError

EOD = "<|endoftext|>"
STDLIB = Path(sysconfig.get_paths()["stdlib"])
TEXT = (STDLIB / "argparse.py").read_text(encoding="utf-8")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A tokenizer trained on one module."""
    path = tmp_path / "tokenizer.json"
    train_tokenizer([TEXT], 400, EOD).save(str(path))
    return path


@pytest.mark.parametrize("text", [TEXT, "naïve ☕ 日本語 \x00\x7f\t\r\n", " leading", f"a{EOD}b"])
def test_round_trip_is_exact(path: Path, text: str) -> None:
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert max(ids) < tokenizer.get_vocab_size() == 400


def test_text_cannot_forge_an_end_of_document(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(f"a{EOD}b", add_special_tokens=False).ids
    assert eod_id(tokenizer, TokenizerConfig()) not in ids


def test_a_vocabulary_without_room_for_all_bytes_is_refused() -> None:
    with pytest.raises(DataError, match="at least 257 are needed"):
        train_tokenizer(["abc"], 100, EOD)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file"):
        load_tokenizer(tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(DataError, match=r"cannot read '.*broken\.json'"):
        load_tokenizer(broken)


def test_an_unknown_end_of_document_token_is_named(path: Path) -> None:
    config = TokenizerConfig(path=str(path), eod_token="</s>")
    with pytest.raises(DataError, match=r"data\.tokenizer\.eod_token: '</s>' is not in"):
        eod_id(load_tokenizer(path), config)


def test_a_tokenizer_that_cuts_or_pads_loses_nothing_here(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(path))
    again = load_tokenizer(path)
    (encoding,) = again.encode_batch_fast([TEXT], add_special_tokens=False)
    assert again.decode(encoding.ids, skip_special_tokens=False) == TEXT


def test_bytes_of_tokens_are_the_bytes_of_the_text(path: Path) -> None:
    """Also where characters of several bytes are split; the end of a document is no text."""
    tokenizer = load_tokenizer(path)
    lengths = token_bytes(tokenizer)
    assert len(lengths) == count_ids(tokenizer) == 400
    for text in (TEXT, "naïve ☕ 日本語"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert lengths[ids].sum() == len(text.encode())
    assert lengths[eod_id(tokenizer, TokenizerConfig())] == 0
