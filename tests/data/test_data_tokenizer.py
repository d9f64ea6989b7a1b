"""The tokenizer loses nothing, and only the program writes an end of document."""

import json
import random
import sysconfig
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from moebius.data.config import TokenizerConfig
from moebius.data.tokenizer import count_ids, eod_id, load_tokenizer, token_bytes, train_tokenizer
from moebius.errors import DataError

EOD = "<|endoftext|>"
UNICODE = [
    "",
    " ",
    "  two leading spaces, a trailing one ",
    "tabs\t\tand\r\nline\rends\n\n\n",
    "naïve Größe, ελληνικά, русский, 数据处理, かな, 한국어, עברית, العربية",
    "🧵👩‍🚀🏳️‍🌈, e\u0301 against é, ﬁ, ½, \u00a0, \u200b, \ufeff",
    "\x00\x01\x1b[0m\x7f\x85\u2028\uffff\U0010ffff",
]


def modules() -> list[str]:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    names = ("csv.py", "enum.py", "html/entities.py", "encodings/cp437.py")
    return [(stdlib / name).read_text(encoding="utf-8") for name in names]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Trained on some modules, written and read back, as `prepare` uses it."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(modules(), 600, EOD).save(str(path))
    return load_tokenizer(path)


def round_trip(tokenizer: Tokenizer, text: str) -> str:
    return str(tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids))


def saved(tokenizer: Tokenizer, folder: Path) -> Path:
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def message_of(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_source_text_survives_unchanged(tokenizer: Tokenizer) -> None:
    """Also modules that the tokenizer has not seen."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    unseen = [(stdlib / f"{name}.py").read_text(encoding="utf-8") for name in ("ast", "difflib")]
    for text in modules() + unseen:
        assert round_trip(tokenizer, text) == text


@pytest.mark.parametrize("text", UNICODE)
def test_unicode_survives_unchanged(tokenizer: Tokenizer, text: str) -> None:
    assert round_trip(tokenizer, text) == text


def test_any_text_survives_unchanged(tokenizer: Tokenizer) -> None:
    """Random code points of all planes, surrogates excepted: those are no UTF-8."""
    rng = random.Random(0)
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    for length in range(1, 200):
        text = "".join(map(chr, rng.choices(points, k=length)))
        assert round_trip(tokenizer, text) == text


def test_any_bytes_that_are_utf8_survive_unchanged(tokenizer: Tokenizer) -> None:
    """Every one-byte and every two-byte sequence that is UTF-8."""
    pairs = [bytes([first, second]) for first in range(256) for second in range(256)]
    valid = []
    for data in [bytes([value]) for value in range(256)] + pairs:
        try:
            valid.append(data.decode())
        except UnicodeDecodeError:
            continue
    assert len(valid) == 128 + 128**2 + 30 * 64
    assert [round_trip(tokenizer, text) for text in valid] == valid


def test_merges_are_learned(tokenizer: Tokenizer) -> None:
    """A tokenizer of bytes alone would be lossless too."""
    text = modules()[0]
    num_tokens = len(tokenizer.encode(text, add_special_tokens=False).ids)
    assert num_tokens < 0.7 * len(text.encode())


def test_a_trained_vocabulary_has_the_size_asked_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 600
    assert sorted(tokenizer.get_vocab().values()) == list(range(600))


def test_training_is_deterministic() -> None:
    first, second = (train_tokenizer(modules(), 400, EOD).to_str() for _ in range(2))
    assert first == second


@pytest.mark.parametrize("eod", [EOD, "</s>", "<|im_end|>"])
def test_text_that_spells_the_end_of_document_is_text(tmp_path: Path, eod: str) -> None:
    """However often the corpus holds it."""
    text = f"{eod} the start {eod}{eod} the end {eod}\n{eod}"
    tokenizer = load_tokenizer(saved(train_tokenizer([text] * 20, 400, eod), tmp_path))
    forbidden = eod_id(tokenizer, TokenizerConfig(eod_token=eod))
    assert forbidden not in tokenizer.encode(text, add_special_tokens=False).ids
    assert round_trip(tokenizer, text) == text


@pytest.mark.parametrize("eod", ["EOD", "a", "the"])
def test_an_end_of_document_that_text_can_reach_is_refused(tmp_path: Path, eod: str) -> None:
    """One that is a byte or a word of the text would share its id with it."""
    text = f"{eod} the start {eod}{eod} the end {eod}\n{eod}"
    with pytest.raises(DataError, match=r"data\.tokenizer\.eod_token"):
        eod_id(
            load_tokenizer(saved(train_tokenizer([text] * 20, 400, eod), tmp_path)),
            TokenizerConfig(eod_token=eod),
        )


def test_a_loaded_tokenizer_takes_special_tokens_in_text_for_text(tmp_path: Path) -> None:
    """Also the other ones: none of them may vanish from a document or appear in it."""
    made = train_tokenizer(modules(), 400, EOD)
    made.add_special_tokens(["<|user|>"])
    tokenizer = load_tokenizer(saved(made, tmp_path))
    text = "<|user|> says <|endoftext|>"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert not {tokenizer.token_to_id("<|user|>"), tokenizer.token_to_id(EOD)} & set(ids)
    assert tokenizer.decode(ids) == text


def test_a_loaded_tokenizer_neither_truncates_nor_pads(tmp_path: Path) -> None:
    """Files of the hub often carry such settings; they would cut documents silently."""
    made = train_tokenizer(modules(), 400, EOD)
    made.enable_truncation(8)
    made.enable_padding(length=16)
    tokenizer = load_tokenizer(saved(made, tmp_path))
    for text in ("short", modules()[0]):
        assert round_trip(tokenizer, text) == text


def test_a_loaded_tokenizer_encodes_as_the_one_that_was_saved(tmp_path: Path) -> None:
    made = train_tokenizer(modules(), 400, EOD)
    loaded = load_tokenizer(saved(made, tmp_path))
    text = modules()[1]
    assert loaded.encode(text).ids == made.encode(text).ids
    assert loaded.get_vocab() == made.get_vocab()


def test_further_special_tokens_are_not_reached_by_text(tmp_path: Path) -> None:
    """Like the sentinels of an objective; each has an id of its own inside the vocabulary."""
    names = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    text = f"{EOD}{''.join(names)} the middle <|fim_middle|>"
    made = train_tokenizer([text] * 20, 400, EOD, names)
    tokenizer = load_tokenizer(saved(made, tmp_path))
    ids = [tokenizer.token_to_id(name) for name in [EOD, *names]]
    assert len(set(ids)) == 4
    assert count_ids(tokenizer) <= 400
    assert not set(ids) & set(tokenizer.encode(text, add_special_tokens=False).ids)
    assert round_trip(tokenizer, text) == text
    assert token_bytes(tokenizer)[ids].sum() == 0


@pytest.mark.parametrize(("size", "fits"), [(258, False), (259, True)])
def test_further_special_tokens_need_room_in_the_vocabulary(size: int, fits: bool) -> None:
    names = ["<|a|>", "<|b|>"]
    if fits:
        assert train_tokenizer(modules(), size, EOD, names).get_vocab_size() == size
        return
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size: 258 .*<\|a\|>.*259") as caught:
        train_tokenizer(modules(), size, EOD, names)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [1, 100, 256])
def test_a_vocabulary_too_small_for_the_bytes_is_refused(size: int) -> None:
    with pytest.raises(DataError, match=rf"tokenizer\.vocab_size: {size} .*257") as caught:
        train_tokenizer(modules(), size, EOD)
    assert "\n" not in str(caught.value)


def test_the_smallest_vocabulary_is_bytes_and_end_of_document(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved(train_tokenizer(modules(), 257, EOD), tmp_path))
    assert tokenizer.get_vocab_size() == 257
    text = modules()[0]
    assert len(tokenizer.encode(text, add_special_tokens=False).ids) == len(text.encode())
    assert round_trip(tokenizer, text) == text


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert str(tmp_path / "none.json") in message_of(tmp_path / "none.json")
    assert str(tmp_path) in message_of(tmp_path)  # a folder is no file either


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"model": {}}'])
def test_a_broken_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    assert str(path) in message_of(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = saved(train_tokenizer(modules(), 300, EOD), tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert str(path) in message_of(path)


def test_the_end_of_document_has_the_id_of_its_token(tokenizer: Tokenizer) -> None:
    """The id that the file itself states, and no token of text."""
    stated = {
        entry["content"]: entry["id"] for entry in json.loads(tokenizer.to_str())["added_tokens"]
    }
    assert eod_id(tokenizer, TokenizerConfig()) == stated[EOD]


def test_an_unknown_end_of_document_is_refused(tokenizer: Tokenizer) -> None:
    config = TokenizerConfig(path="some/tokenizer.json", eod_token="</s>")
    with pytest.raises(DataError, match=r"data\.tokenizer\.eod_token") as caught:
        eod_id(tokenizer, config)
    message = str(caught.value)
    assert "'</s>'" in message
    assert "some/tokenizer.json" in message
    assert "\n" not in message


def test_added_tokens_that_are_text_stand_for_their_bytes(tmp_path: Path) -> None:
    """Tokenizers add runs of spaces, for example; only special tokens are no text."""
    made = train_tokenizer(modules(), 400, EOD)
    made.add_tokens(["        ", "::="])
    tokenizer = load_tokenizer(saved(made, tmp_path))
    text = "        größe ::= 1"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert token_bytes(tokenizer)[ids].sum() == len(text.encode())


def test_bytes_of_tokens_are_the_bytes_of_the_text(tokenizer: Tokenizer) -> None:
    """Also where characters of several bytes are split; the end of a document is no text."""
    lengths = token_bytes(tokenizer)
    assert len(lengths) == count_ids(tokenizer) == 600
    for text in (*modules(), *UNICODE):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert lengths[ids].sum() == len(text.encode())
    assert lengths[eod_id(tokenizer, TokenizerConfig())] == 0
