"""The fast encoder gives the ids of tokenizers, whatever the text and the tokenizer."""

import functools
import itertools
import json
import pickle
import random
import re
import sysconfig
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from moebius.data import encoding
from moebius.data.encoding import (
    LLAMA3_PATTERN,
    PATTERNS,
    QWEN2_PATTERN,
    SPACE_BLOCK,
    UNUSED_TOKEN,
    Encoder,
    build_encoder,
)
from moebius.data.tokenizer import train_tokenizer

EOD = "<|endoftext|>"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TRICKY = [
    *("'s 't 'RE 'Ve 'll 'd 'ſ 'S '", " ", "  ", "\n", "\r\n", "\t", "\x0b", "\x1c", "\x1f"),
    *("\x85", "\u00a0", "\u180e", "\u2028", "\u200b", "\u3000", "\ufeff", "a", "Z", "é", "e\u0301"),
    *("日本", "한", "ﬁ", "ŉ", "K", "1", "½", "Ⅷ", "٣", "!", "_", "<", "🧵", "\U0010ffff", "\x00"),
    *(UNUSED_TOKEN, EOD, "the", " the", "def "),
]


def sources(pattern: str) -> list[str]:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text(encoding="utf-8") for path in sorted(stdlib.glob(pattern))]


def byte_level(vocab_size: int) -> Tokenizer:
    tokenizer = train_tokenizer(sources("c*.py"), vocab_size, EOD)
    tokenizer.encode_special_tokens = True
    return tokenizer


def split_level(pattern: str, ignore_merges: bool) -> Tokenizer:
    """As Llama 3 and Qwen 2 have it."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, initial_alphabet=BYTES, special_tokens=[], show_progress=False
    )
    tokenizer.train_from_iterator(sources("c*.py"), trainer)
    tokenizer.add_special_tokens(["<|begin|>", EOD])
    tokenizer.encode_special_tokens = True
    return tokenizer


def hand_made(
    merges: list[tuple[str, str]], unmerged: tuple[str, ...] = (), ignore_merges: bool = False
) -> Tokenizer:
    """Bytes, the results of the merges in their order, and tokens that no merge makes."""
    tokens = dict.fromkeys([*BYTES, *(left + right for left, right in merges), *unmerged])
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return tokenizer


MADE: dict[str, Callable[[], Tokenizer]] = {
    "300": lambda: byte_level(300),
    "512": lambda: byte_level(512),
    "4096": lambda: byte_level(4096),
    "llama3": lambda: split_level(LLAMA3_PATTERN, ignore_merges=True),
    "qwen2": lambda: split_level(QWEN2_PATTERN, ignore_merges=False),
}


@functools.cache
def made(name: str) -> Tokenizer:
    return MADE[name]()


@pytest.fixture(params=MADE)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return made(request.param)


@pytest.fixture
def small() -> Tokenizer:
    return made("512")


def expected(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def encoded(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in encoder.encode(texts)]


class Counting:
    """A tokenizer that keeps what it is asked to encode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.texts: list[str] = []

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> object:
        self.texts += texts
        return self.tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)


def counting(tokenizer: Tokenizer) -> tuple[Encoder, list[str]]:
    """An encoder, and the list of those texts that it gives to tokenizers."""
    encoder = build_encoder(tokenizer)
    encoder.tokenizer = counter = Counting(tokenizer)
    return encoder, counter.texts


def check_fast(tokenizer: Tokenizer, texts: list[str]) -> None:
    encoder, slow = counting(tokenizer)
    assert encoded(encoder, texts) == expected(tokenizer, texts)
    assert slow == []


def check_mostly_fast(tokenizer: Tokenizer, texts: list[str]) -> None:
    """Versions of the libraries may differ in what Unicode they know."""
    encoder, slow = counting(tokenizer)
    assert encoded(encoder, texts) == expected(tokenizer, texts)
    unlike = encoder.characters.unlike
    assert slow == [text for text in texts if unlike & set(text) or UNUSED_TOKEN in text]
    assert len(slow) < len(texts) / 2


def check_slow(tokenizer: Tokenizer, texts: list[str]) -> None:
    encoder, slow = counting(tokenizer)
    assert encoded(encoder, texts) == expected(tokenizer, texts)
    assert slow == texts


def test_source_text_has_the_same_ids(tokenizer: Tokenizer) -> None:
    """Most of it text that the tokenizer has not seen."""
    check_fast(tokenizer, sources("di*.py") + sources("encodings/cp85*.py"))


@pytest.mark.parametrize("name", ["4096", "llama3"])
def test_random_text_of_all_planes_has_the_same_ids(name: str) -> None:
    rng = random.Random(0)
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    planes = [points, range(0x80), range(0x100), range(0x2000, 0x3100), range(0x10000, 0x20000)]
    texts = [
        "".join(map(chr, rng.choices(plane, k=rng.randrange(40))))
        for plane in planes
        for _ in range(200)
    ]
    check_mostly_fast(made(name), texts)


@pytest.mark.parametrize("name", ["4096", "llama3"])
def test_random_text_of_tricky_parts_has_the_same_ids(name: str) -> None:
    rng = random.Random(1)
    texts = ["".join(rng.choices(TRICKY, k=rng.randrange(15))) for _ in range(2000)]
    check_mostly_fast(made(name), texts)


def test_repetitions_have_the_same_ids(tokenizer: Tokenizer) -> None:
    """Merges of a token with itself depend on the end at which they start."""
    parts = ["a", " ", "=", "-", "ab", "aba", "  a", "\n", "é", "日", "abcabcab", "'s"]
    counts = [*range(1, 70), 127, 128, 129, 500, 999]
    check_fast(tokenizer, [part * count for part in parts for count in counts])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_both_libraries_cut_the_same_pieces(pattern: str) -> None:
    """Every string of four characters of all kinds; where pieces end, ids alone may not show."""
    kinds = ["a", "s", "L", "l", "'", "1", " ", "\n", "\r", "!", "ſ", "\u3000"]
    texts = ["".join(text) for k in range(1, 5) for text in itertools.product(kinds, repeat=k)]
    # Each piece is a token, and tiktoken looks up a piece before it merges.
    single = [bytes([value]) for value in range(256)]
    tokens = list(dict.fromkeys([*single, *(text.encode() for text in texts)]))
    ranks = {token: rank for rank, token in enumerate(tokens)}
    one = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    other = pre_tokenizers.Split(Regex(pattern), "isolated")
    for text in texts:
        pieces = [piece.encode() for piece, _ in other.pre_tokenize_str(text)]
        assert [tokens[rank] for rank in one.encode_ordinary(text)] == pieces


def test_classes_are_all_that_the_patterns_ask_of_a_character() -> None:
    for pattern in PATTERNS:
        asked = set(re.findall(r"\[.*?\]|\\p\{.\}|\\.", pattern))
        assert asked <= set(encoding.CLASSES)
        for group in re.findall(r"\(\?i:(.*?)\)", pattern):
            assert {f"(?i:{letter})" for letter in group if letter != "|"} <= set(encoding.CLASSES)


def test_byte_level_cuts_by_the_pattern_of_gpt2() -> None:
    kinds = ["a", "s", "'", "1", " ", "\n", "!", "é"]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    split = pre_tokenizers.Split(Regex(encoding.GPT2_PATTERN), "isolated")
    for text in map("".join, itertools.product(kinds, repeat=4)):
        spans = [span for _, span in byte_level.pre_tokenize_str(text)]
        assert spans == [span for _, span in split.pre_tokenize_str(text)]


def random_merges(rng: random.Random) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    """Merges of a and b that no trainer would choose, several for a token, and more tokens."""
    tokens = ["a", "b"]
    merges: list[tuple[str, str]] = []
    for _ in range(rng.randrange(1, 25)):
        token = "".join(rng.choices(tokens, k=2))
        cuts = [(token[:end], token[end:]) for end in range(1, len(token))]
        cuts = [cut for cut in cuts if set(cut) <= set(tokens)]
        if token not in tokens:
            merges += rng.sample(cuts, rng.randrange(1, len(cuts) + 1))
            tokens.append(token)
    unmerged = ("".join(rng.choices(tokens, k=rng.randrange(2, 5))) for _ in range(2))
    return merges, tuple(unmerged)


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_random_merges_give_the_same_ids(ignore_merges: bool) -> None:
    """Tokens that merges reach never or in several ways; without a look-up none is a hindrance."""
    rng = random.Random(2)
    texts = ["".join(text) for k in range(1, 7) for text in itertools.product("ab", repeat=k)]
    texts += ["".join(rng.choices("ab", k=rng.randrange(250))) for _ in range(50)]
    num_fast = 0
    for _ in range(16):
        tokenizer = hand_made(*random_merges(rng), ignore_merges)
        encoder = build_encoder(tokenizer)
        assert encoded(encoder, texts) == expected(tokenizer, texts)
        num_fast += encoder.fast is not None
    assert 1 < num_fast < 15 if ignore_merges else num_fast == 16


def test_merges_that_tiktoken_would_invent_are_not_made() -> None:
    """`abc` is a token of a+bc, but a+b comes first: tokenizers stays at ab, c."""
    merges = [("a", "b"), ("b", "c"), ("a", "bc")]
    texts = ["abc", "ab", "bc", "abcbc", "cabca", "abc abc"]
    tokenizer = hand_made(merges)
    naive = tiktoken.Encoding(
        "x",
        pat_str=encoding.GPT2_PATTERN,
        mergeable_ranks={
            bytes(encoding.byte_spelling()[character] for character in token): token_id
            for token, token_id in tokenizer.get_vocab().items()
        },
        special_tokens={},
    )
    assert naive.encode_ordinary("cabca") != expected(tokenizer, ["cabca"])[0]
    check_fast(tokenizer, texts)
    # Here tokenizers does give `abc`, but only where it is a whole piece.
    check_slow(hand_made(merges, ignore_merges=True), texts)


def test_a_token_that_only_a_whole_piece_is_stays_one() -> None:
    """`abcd` is reached by no merge, whose end is three tokens: Llama 3 has such ones."""
    texts = ["abcd", "abcda", "aabcd", " abcd", "bcd", "abcd abcd", "abcd1abcd"]
    whole = hand_made([("b", "c")], ignore_merges=True, unmerged=("abcd",))
    assert whole.encode("abcd1abcd").tokens == ["abcd", "1", "abcd"]
    check_fast(whole, texts)
    merged = hand_made([("b", "c")], unmerged=("abcd",))
    assert merged.encode("abcd").tokens == ["a", "bc", "d"]
    check_fast(merged, texts)


def with_spec(tokenizer: Tokenizer, change: Callable[[dict], None]) -> Tokenizer:
    spec = json.loads(tokenizer.to_str())
    change(spec)
    changed = Tokenizer.from_str(json.dumps(spec))
    changed.encode_special_tokens = True
    return changed


def drop_a_byte(spec: dict) -> None:
    """One that no merge needs."""
    del spec["model"]["vocab"][BYTES[-1]]


def give_two_tokens_one_id(spec: dict) -> None:
    """That of a merge and that of a byte which UTF-8 does not have."""
    vocab, merge = spec["model"]["vocab"], spec["model"]["merges"][0]
    vocab["".join(merge)] = vocab["ÿ"]


def swap_two_merges(spec: dict) -> None:
    merges = spec["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def sequence(*steps: dict) -> dict:
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}}


DIGITS = {"type": "Digits", "individual_digits": True}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPLIT = {
    "type": "Split",
    "pattern": {"Regex": LLAMA3_PATTERN},
    "behavior": "Isolated",
    "invert": False,
}
TRUNCATION = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 99},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": EOD,
}
FALLBACKS: dict[str, Callable[[dict], None]] = {
    "normalizer": lambda spec: spec.update(normalizer={"type": "NFC"}),
    "truncation": lambda spec: spec.update(truncation=TRUNCATION),
    "padding": lambda spec: spec.update(padding=PADDING),
    "added": lambda spec: spec["added_tokens"][0].update(special=False),
    "prefix space": lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True),
    "no regex": lambda spec: spec["pre_tokenizer"].update(use_regex=False),
    "no pieces": lambda spec: spec.update(pre_tokenizer=None),
    "two regexes": lambda spec: spec.update(sequence(SPLIT, LEVEL)),
    "digits": lambda spec: spec.update(sequence(DIGITS, LEVEL)),
    "another pattern": lambda spec: spec.update(
        sequence(SPLIT | {"pattern": {"Regex": r"\p{Lu}|\s+"}}, LEVEL | {"use_regex": False})
    ),
    "a string": lambda spec: spec.update(
        sequence(SPLIT | {"pattern": {"String": "e"}}, LEVEL | {"use_regex": False})
    ),
    "removed": lambda spec: spec.update(
        sequence(SPLIT | {"behavior": "Removed", "invert": True}, LEVEL | {"use_regex": False})
    ),
    "unknown": lambda spec: spec["model"].update(unk_token=EOD),
    "byte fallback": lambda spec: spec["model"].update(byte_fallback=True),
    "prefix": lambda spec: spec["model"].update(merges=[], continuing_subword_prefix="##"),
    "suffix": lambda spec: spec["model"].update(end_of_word_suffix="</w>"),
    "byte": drop_a_byte,
    "same id": give_two_tokens_one_id,
    "order": swap_two_merges,
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_what_tiktoken_cannot_do_is_done_by_tokenizers(small: Tokenizer, case: str) -> None:
    texts = [*TRICKY, f"a{EOD}b", "x = 123 + é", "e\u0301 \u212b", *sources("csv.py")]
    check_slow(with_spec(small, FALLBACKS[case]), texts)


def test_dropout_is_left_to_tokenizers(small: Tokenizer) -> None:
    """Its ids are random."""
    tokenizer = with_spec(small, lambda spec: spec["model"].update(dropout=0.5))
    assert build_encoder(tokenizer).fast is None


def test_another_model_is_left_to_tokenizers() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    check_slow(tokenizer, ["a b", "b c a"])


def test_a_normalizer_changes_ids(small: Tokenizer) -> None:
    """Or its fallback would be for nothing."""
    tokenizer = with_spec(small, lambda spec: None)
    tokenizer.normalizer = normalizers.NFC()
    text = "e\u0301"
    assert expected(tokenizer, [text]) != expected(small, [text])
    check_slow(tokenizer, [text])


def test_special_tokens_in_text_are_text(small: Tokenizer) -> None:
    check_fast(small, [EOD, f"a {EOD}b{EOD}{EOD}"])
    check_slow(small, [UNUSED_TOKEN, f"é{UNUSED_TOKEN}é{UNUSED_TOKEN}"])


def test_special_tokens_that_a_tokenizer_finds_are_left_to_it(small: Tokenizer) -> None:
    tokenizer = Tokenizer.from_str(small.to_str())
    assert not tokenizer.encode_special_tokens
    check_slow(tokenizer, [EOD, f"a {EOD}b"])


@pytest.mark.parametrize("eod", ["EOD", "a", "the", "日", "日本"])
def test_special_tokens_that_text_reaches_have_the_same_ids(eod: str) -> None:
    text = f"{eod} the start {eod}{eod} the end {eod}\n{eod}"
    tokenizer = train_tokenizer([text] * 20, 400, eod)
    tokenizer.encode_special_tokens = True
    texts = [text, eod, f" {eod}"]
    assert encoded(build_encoder(tokenizer), texts) == expected(tokenizer, texts)


@pytest.mark.parametrize(
    "text",
    [
        "a" * 250_000,
        "!" * 300_000,
        "12" * 100_000,
        " " * (2 * SPACE_BLOCK - 1),
        "x" + "\n" * (2 * SPACE_BLOCK - 2) + "x",
        " \r\n\t" * 40_000 + "x",
        (" " * (SPACE_BLOCK - 1) + "a") * 100,
        ("a" + "\t" * (SPACE_BLOCK + 1)) * 100,
    ],
    ids=len,
)
@pytest.mark.parametrize("kind", ["512", "llama3"])
def test_long_pieces_have_the_same_ids(text: str, kind: str) -> None:
    tokenizer = made(kind)
    assert encoded(build_encoder(tokenizer), [text]) == expected(tokenizer, [text])


def test_a_run_of_spaces_that_tiktoken_cannot_take_has_the_same_ids(small: Tokenizer) -> None:
    """It gives up at a million; shorter ones are left to tokenizers from a block's length on."""
    texts = ["x" + " " * 1_000_001 + "x", "\n" * 2 * SPACE_BLOCK]
    encoder, slow = counting(small)
    assert [small.decode(ids) for ids in encoder.encode(texts)] == texts
    assert slow == texts
    check_fast(small, [" " * (SPACE_BLOCK - 1), "x" * SPACE_BLOCK * 2 + " " * (SPACE_BLOCK - 1)])


def test_a_character_that_the_engines_class_differently_is_left_to_tokenizers(
    small: Tokenizer,
) -> None:
    encoder, slow = counting(small)
    encoder.characters.unlike.add("é")
    texts = ["plain", "caf\u00e9", "größe", "é", "日本"]
    assert encoded(encoder, texts) == expected(small, texts)
    assert slow == ["caf\u00e9", "é"]


class Vowels:
    def __init__(self, vowels: str) -> None:
        self.vowels = vowels

    def members(self, text: str) -> set[str]:
        return set(text) & set(self.vowels)


def test_characters_are_unlike_if_either_engine_alone_finds_them() -> None:
    check = encoding.CharacterCheck()
    check._engines = [(Vowels("aei"), Vowels("aeo")), (Vowels("xy"), Vowels("xyz"))]  # type: ignore
    check.check("aeiou")
    check.check("xyz\ud800")
    assert check.unlike == {"i", "o", "z", "\ud800"}
    assert check.alike == set("aeuxy")
    assert check.all_alike("aux")
    assert not check.all_alike("auxi")


def test_an_encoder_whose_ascii_differs_is_slow(
    small: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's own idea of a space would be such a difference."""

    def members(engine: object, text: str) -> set[str]:
        return {character for character in text if character.isspace()}

    monkeypatch.setattr(encoding._TokenizersClass, "members", members)
    check_slow(small, ["a b", "a\x1cb"])


@pytest.mark.parametrize("engine", [encoding._TiktokenClass, encoding._TokenizersClass])
def test_engines_find_the_members_of_a_class(engine: type) -> None:
    """Compared with Python's table on blocks that have not changed for long."""
    text = "".join(map(chr, [*range(0x250), *range(0x4E00, 0x5000), *range(0xFF00, 0xFF5F)]))
    letters = {character for character in text if unicodedata.category(character)[0] == "L"}
    numbers = {character for character in text if unicodedata.category(character)[0] == "N"}
    assert engine(r"\p{L}").members(text) == letters
    assert engine(r"\p{N}").members(text) == numbers
    assert engine(r"\s").members(text) == set("\t\n\x0b\x0c\r \x85\xa0")
    assert engine(r"[^\s\p{L}\p{N}]").members("a1 !é½\n日_") == set("!_")
    assert engine("(?i:s)").members("sSſßxt") == set("sSſ")
    assert engine(r"\s").members("") == set()


def test_lone_surrogates_are_refused_as_by_tokenizers(small: Tokenizer) -> None:
    for texts in (["\ud800"], ["fine", "a\udfffb"], ["\ud83e\uddf5"]):
        with pytest.raises(TypeError):
            small.encode_batch_fast(texts, add_special_tokens=False)
        with pytest.raises(TypeError):
            build_encoder(small).encode(texts)


def test_no_texts_have_no_ids(small: Tokenizer) -> None:
    assert build_encoder(small).encode([]) == []
    assert encoded(build_encoder(small), ["", "a", ""])[::2] == [[], []]


def test_ids_have_the_type_of_shards(small: Tokenizer) -> None:
    encoder = build_encoder(small)
    encoder.characters.unlike.add("é")
    assert [ids.dtype.name for ids in encoder.encode(["", "fast", "é"])] == ["uint32"] * 3


def test_a_pickled_encoder_encodes_as_before(small: Tokenizer) -> None:
    """Also special tokens, which a pickled tokenizer would find in text."""
    texts = [*TRICKY, f"a{EOD}b"]
    normalizing = with_spec(small, FALLBACKS["normalizer"])
    for tokenizer, fast in ((small, True), (normalizing, False)):
        encoder = pickle.loads(pickle.dumps(build_encoder(tokenizer)))
        assert encoded(encoder, texts) == expected(tokenizer, texts)
        assert (encoder.fast is not None) == fast


def test_bytes_are_spelled_as_byte_level_spells_them() -> None:
    spelling = encoding.byte_spelling()
    assert sorted(spelling) == BYTES
    assert sorted(spelling.values()) == list(range(256))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in map(chr, [*range(0x800), 0x800, 0xFFFF, 0x10000, 0x10FFFF]):
        ((spelled, _),) = level.pre_tokenize_str(text)
        assert bytes(spelling[character] for character in spelled) == text.encode()
