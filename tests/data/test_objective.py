"""Objectives rearrange each document in place and lose no token but those sentinels displace."""

import hashlib
import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from moebius.data.objective import (
    CausalObjective,
    Draws,
    FimObjective,
    Objective,
    SpanObjective,
    Transform,
    build_transform,
    sentinels,
)
from moebius.errors import DataError

EOD = 0
FIRST_SENTINEL = 10_000
PREFIX, SUFFIX, MIDDLE = range(FIRST_SENTINEL, FIRST_SENTINEL + 3)
MASKS = tuple(range(FIRST_SENTINEL, FIRST_SENTINEL + 8))
SEPARATOR, END = FIRST_SENTINEL + 8, FIRST_SENTINEL + 9

PSM = FimObjective(rate=1, spm_rate=0)
SPM = FimObjective(rate=1, spm_rate=1)
FIM = FimObjective(rate=1)
SPAN = SpanObjective(rate=1)


def transform_of(objective: FimObjective | SpanObjective, seed: int = 0) -> Transform:
    """The transform where sentinels are the ids from FIRST_SENTINEL on."""
    ids = {token: FIRST_SENTINEL + number for number, token in enumerate(sentinels(objective))}
    transform = build_transform(objective, ids.get, EOD, seed)
    assert transform is not None
    return transform


def window_of(*lengths: int) -> NDArray[np.int64]:
    """Documents of such lengths with an end between any two; all other tokens differ."""
    numbers = itertools.count(1)
    documents = [[next(numbers) for _ in range(length)] for length in lengths]
    tokens = documents[0]
    for document in documents[1:]:
        tokens = [*tokens, EOD, *document]
    return np.array(tokens, dtype=np.int64)


def parts_of(window: NDArray[np.int64]) -> list[list[int]]:
    """What lies between ends of documents, one token after the other."""
    parts: list[list[int]] = [[]]
    for token in window.tolist():
        if token == EOD:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def is_transformed(part: list[int]) -> bool:
    return any(token >= FIRST_SENTINEL for token in part)


def undo_fim(part: list[int]) -> list[int]:
    """Text of a rearranged document: the pieces after each sentinel, prefix, middle, suffix."""
    pieces: dict[int, list[int]] = {}
    sentinel = -1
    for token in part:
        if token >= FIRST_SENTINEL:
            sentinel = token
            assert sentinel not in pieces
            pieces[sentinel] = []
        else:
            pieces[sentinel].append(token)
    return pieces[PREFIX] + pieces[MIDDLE] + pieces[SUFFIX]


def masked_spans(part: list[int]) -> list[list[int]]:
    """The spans after the separator, each as `<mask_i> span <eom>`, i from 1 on."""
    assert part.count(SEPARATOR) == 1
    tail = part[part.index(SEPARATOR) + 1 :]
    spans: list[list[int]] = []
    while tail:
        end = tail.index(END)
        assert tail[0] == MASKS[len(spans)]
        spans.append(tail[1:end])
        tail = tail[end + 1 :]
    return spans


def undo_span(part: list[int]) -> list[int]:
    """Text of a masked document: its spans put where their sentinels stand."""
    spans = masked_spans(part)
    head = part[: part.index(SEPARATOR)]
    assert [token for token in head if token >= FIRST_SENTINEL] == list(MASKS[: len(spans)])
    text = []
    for token in head:
        text += spans[MASKS.index(token)] if token in MASKS else [token]
    return text


def undo(objective: FimObjective | SpanObjective, part: list[int]) -> list[int]:
    return undo_fim(part) if isinstance(objective, FimObjective) else undo_span(part)


def num_spans(objective: SpanObjective, length: int) -> int:
    """As the configuration says: so much is masked, in spans of such a mean, at least one."""
    wanted = round(objective.mask_ratio * length / objective.mean_span)
    return max(1, min(len(objective.mask_tokens), wanted))


def num_dropped(objective: FimObjective | SpanObjective, length: int) -> int:
    """Three sentinels; or a separator and, for each span, its mask twice and its end."""
    return 3 if isinstance(objective, FimObjective) else 1 + 3 * num_spans(objective, length)


# What is kept.

OBJECTIVES = [
    pytest.param(PSM, id="psm"),
    pytest.param(SPM, id="spm"),
    pytest.param(FIM, id="fim"),
    pytest.param(SPAN, id="span"),
    pytest.param(SpanObjective(rate=1, mask_ratio=0.9, mean_span=1), id="span dense"),
    pytest.param(SpanObjective(rate=1, mask_ratio=0.5, mean_span=30), id="span long"),
    pytest.param(SpanObjective(rate=1, mask_tokens=("<a>", "<b>")), id="span two masks"),
]
"""objectives that leave no document of a fair length as it is"""


@pytest.mark.parametrize("objective", OBJECTIVES[:-1])
def test_the_text_can_be_rebuilt_but_for_its_dropped_end(
    objective: FimObjective | SpanObjective,
) -> None:
    """Documents of every length up to 120 and a long one, a dozen samples of each."""
    transform = transform_of(objective)
    for length in [*range(121), 2000]:
        window = window_of(length)
        for sample in range(12):
            part = transform(window, sample).tolist()
            assert len(part) == length
            dropped = num_dropped(objective, length)
            if length < 2 * dropped:
                assert part == window.tolist(), "sentinels would outnumber the text"
            else:
                assert undo(objective, part) == window.tolist()[: length - dropped]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_token_of_the_text_appears_once(objective: FimObjective | SpanObjective) -> None:
    for sample, length in enumerate(range(60, 200)):
        part = transform_of(objective)(window_of(length), sample).tolist()
        kept = sorted(token for token in part if token < FIRST_SENTINEL)
        assert kept == list(range(1, length - num_dropped(objective, length) + 1))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "lengths", [(300,), (80, 90, 100), (0, 90, 0, 0, 70, 0), (0,), (0, 0), (1, 120, 5, 200, 60)]
)
def test_ends_of_documents_stay_and_documents_do_not_mix(
    objective: FimObjective | SpanObjective, lengths: tuple[int, ...]
) -> None:
    window = window_of(*lengths)
    transform = transform_of(objective)
    for sample in range(20):
        transformed = transform(window, sample)
        assert transformed.shape == window.shape
        assert transformed.dtype == np.int64
        np.testing.assert_array_equal(transformed == EOD, window == EOD)
        for before, after in zip(parts_of(window), parts_of(transformed), strict=True):
            text = {token for token in after if token < FIRST_SENTINEL}
            assert text <= set(before)
            assert is_transformed(after) == (len(before) >= 50)


def test_the_given_window_is_not_written_to() -> None:
    window = window_of(100, 100)
    window.setflags(write=False)
    transformed = transform_of(FIM)(window, 0)
    assert not np.shares_memory(transformed, window)
    np.testing.assert_array_equal(window, window_of(100, 100))


def test_an_end_of_document_may_have_any_id() -> None:
    window = np.where(window_of(100, 100) == EOD, 777, window_of(100, 100))
    transformed = Transform(PSM, (PREFIX, SUFFIX, MIDDLE), 777, seed=0)(window, 0)
    assert np.flatnonzero(transformed == 777).tolist() == [100]
    assert [transformed[0], transformed[101]] == [PREFIX, PREFIX]


# Layouts.


def test_orders_of_prefix_suffix_and_middle() -> None:
    """The middle is last in both; SPM is PSM with the other two exchanged."""
    for sample in range(20):
        psm = transform_of(PSM)(window_of(40), sample).tolist()
        spm = transform_of(SPM)(window_of(40), sample).tolist()
        assert [token for token in psm if token >= FIRST_SENTINEL] == [PREFIX, SUFFIX, MIDDLE]
        assert [token for token in spm if token >= FIRST_SENTINEL] == [SUFFIX, PREFIX, MIDDLE]
        suffix, middle = psm.index(SUFFIX), psm.index(MIDDLE)
        assert spm == psm[suffix:middle] + psm[:suffix] + psm[middle:]


def frequencies(objective: FimObjective | SpanObjective, length: int, samples: int) -> Counter[Any]:
    transform, window = transform_of(objective), window_of(length)
    return Counter(tuple(transform(window, sample).tolist()) for sample in range(samples))


def assert_near(count: int, expected: float) -> None:
    """Within five standard deviations of a count that is Poisson's."""
    assert abs(count - expected) < 5 * expected**0.5, f"{count}, expected about {expected}"


def test_two_cuts_are_anywhere_with_equal_chance() -> None:
    """All pairs of cuts of a text of four tokens, the two orders of a pair being one layout."""
    found = frequencies(PSM, length=7, samples=5000)
    chances: Counter[Any] = Counter()
    for cuts in itertools.product(range(5), repeat=2):
        a, b = min(cuts), max(cuts)
        text = (1, 2, 3, 4)
        chances[(PREFIX, *text[:a], SUFFIX, *text[b:], MIDDLE, *text[a:b])] += 1
    assert found.keys() == chances.keys()
    for layout, chance in chances.items():
        assert_near(found[layout], 5000 * chance / 25)


def runs(numbers: tuple[int, ...]) -> list[list[int]]:
    """Consecutive numbers together."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][-1] == number - 1:
            found[-1].append(number)
        else:
            found.append([number])
    return found


@pytest.mark.parametrize(
    ("length", "mask_ratio", "mean_span", "spans", "size", "masked", "layouts"),
    [
        (8, 0.3, 3, 1, 4, 1, 4),  # the shortest document that is masked
        (15, 0.4, 3, 2, 8, 3, 30),
        (22, 0.5, 4, 3, 12, 6, 350),
        (20, 0.14, 1, 3, 10, 3, 56),  # one token is to be masked, but in three spans
        (20, 0.95, 6, 3, 10, 8, 21),  # ten are, but two must be left between the spans
    ],
)
def test_all_ways_to_mask_have_equal_chance(
    length: int,
    mask_ratio: float,
    mean_span: float,
    spans: int,
    size: int,
    masked: int,
    layouts: int,
) -> None:
    """All sets of so many tokens that form so many runs: spans are disjoint and never adjacent."""
    objective = SpanObjective(rate=1, mask_ratio=mask_ratio, mean_span=mean_span)
    found = frequencies(objective, length, samples=40 * layouts)
    wanted = set()
    for chosen in itertools.combinations(range(1, size + 1), masked):
        if len(runs(chosen)) == spans:
            mask_before = {run[0]: mask for run, mask in zip(runs(chosen), MASKS, strict=False)}
            head, tail = [], [SEPARATOR]
            for token in range(1, size + 1):
                if token in mask_before:
                    head.append(mask_before[token])
                if token not in chosen:
                    head.append(token)
            for run in runs(chosen):
                tail += [mask_before[run[0]], *run, END]
            wanted.add(tuple(head + tail))
    assert len(wanted) == layouts
    assert found.keys() == wanted
    for count in found.values():
        assert_near(count, 40)


@pytest.mark.parametrize(
    ("length", "spans", "masked"),
    [(20, 1, 2), (40, 2, 5), (100, 5, 13), (160, 8, 20), (1000, 8, 146)],
)
def test_number_of_spans_and_of_masked_tokens(length: int, spans: int, masked: int) -> None:
    """With the defaults: 15 % in spans of three tokens, longer ones where masks are too few."""
    for sample in range(20):
        part = transform_of(SPAN)(window_of(length), sample).tolist()
        assert len(masked_spans(part)) == spans
        assert sum(len(span) for span in masked_spans(part)) == masked
        assert all(masked_spans(part))


def test_span_lengths_vary_around_their_mean() -> None:
    """159 tokens ask for 8 spans of 4; of the 134 that remain 27 are masked."""
    transform = transform_of(SpanObjective(rate=1, mask_ratio=0.2, mean_span=4))
    lengths = [
        len(span)
        for sample in range(200)
        for span in masked_spans(transform(window_of(159), sample).tolist())
    ]
    assert np.mean(lengths) == 27 / 8
    assert {1, 2, 3, 4, 5, 6, 7, 8} <= set(lengths)


def test_shortest_documents_that_are_transformed() -> None:
    for objective, shortest in ((PSM, 6), (SPM, 6), (SPAN, 8)):
        transform = transform_of(objective)
        for length in range(20):
            part = transform(window_of(length), 0).tolist()
            assert is_transformed(part) == (length >= shortest)


# Rates.


@pytest.mark.parametrize("kind", [FimObjective, SpanObjective])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_rate_is_the_share_of_documents_that_are_transformed(
    kind: type[FimObjective | SpanObjective], rate: float
) -> None:
    """Each document for itself: the first and the last of a window alike."""
    transform, window = transform_of(kind(rate=rate)), window_of(*[12] * 10)
    changed = np.zeros(10)
    for sample in range(1000):
        changed += [is_transformed(part) for part in parts_of(transform(window, sample))]
    deviation = (rate * (1 - rate) * 1000) ** 0.5
    assert np.abs(changed - 1000 * rate).max() <= 5 * deviation
    assert np.abs(changed.sum() - 10_000 * rate) <= 5 * deviation * 10**0.5


def test_documents_of_a_window_are_chosen_independently() -> None:
    """Of two neighbours both are transformed in a quarter of the samples."""
    transform, window = transform_of(FimObjective(rate=0.5)), window_of(12, 12)
    outcomes = Counter(
        tuple(is_transformed(part) for part in parts_of(transform(window, sample)))
        for sample in range(4000)
    )
    assert len(outcomes) == 4
    for count in outcomes.values():
        assert_near(count, 1000)


@pytest.mark.parametrize("spm_rate", [0.0, 0.25, 0.5, 1.0])
def test_spm_rate_is_the_share_of_rearranged_documents(spm_rate: float) -> None:
    transform = transform_of(FimObjective(rate=0.5, spm_rate=spm_rate))
    first = Counter(
        part[0]
        for sample in range(500)
        for part in parts_of(transform(window_of(*[12] * 10), sample))
        if is_transformed(part)
    )
    share = first[SUFFIX] / first.total()
    assert first.total() == first[PREFIX] + first[SUFFIX]
    assert abs(share - spm_rate) <= 5 * (spm_rate * (1 - spm_rate) / first.total()) ** 0.5


def test_a_rate_of_zero_changes_nothing() -> None:
    window = window_of(100, 0, 30)
    for objective in (FimObjective(rate=0), SpanObjective(rate=0)):
        for sample in range(50):
            np.testing.assert_array_equal(transform_of(objective)(window, sample), window)


# Randomness.


@pytest.mark.parametrize("objective", [FIM, SPAN])
def test_result_depends_on_window_sample_and_seed_alone(
    objective: FimObjective | SpanObjective,
) -> None:
    """Whatever the order of calls and whichever transform is called."""
    windows = [window_of(100), window_of(60, 70)]
    calls = list(itertools.product(range(2), range(10)))
    one, other = transform_of(objective), transform_of(objective)
    forward = {call: one(windows[call[0]], call[1]).tolist() for call in calls}
    backward = {call: other(windows[call[0]], call[1]).tolist() for call in reversed(calls)}
    assert forward == backward
    assert forward == {call: one(windows[call[0]], call[1]).tolist() for call in calls}


@pytest.mark.parametrize("objective", [FIM, SPAN])
def test_samples_seeds_and_documents_differ(objective: FimObjective | SpanObjective) -> None:
    window = window_of(300)
    results = [
        transform_of(objective, seed)(window, sample).tobytes()
        for seed in range(5)
        for sample in range(10)
    ]
    assert len(set(results)) == 50
    text = [*range(1, 301), EOD]
    alike = np.array(text * 10, dtype=np.int64)
    assert len({tuple(part) for part in parts_of(transform_of(objective)(alike, 0))[:-1]}) == 10


def test_results_are_the_same_for_ever() -> None:
    """A change of these is a change of what every run with such an objective is trained on."""
    window, dense = window_of(9, 3, 12), SpanObjective(rate=1, mask_ratio=0.4)
    # fmt: off
    assert transform_of(FIM)(window, 0).tolist() == [
        PREFIX, 1, 2, 3, 4, 5, SUFFIX, MIDDLE, 6, EOD, 10, 11, 12, EOD,
        SUFFIX, 17, 18, 19, 20, 21, PREFIX, 13, MIDDLE, 14, 15, 16,
    ]
    assert transform_of(FIM, seed=7)(window, 123_456_789_012).tolist() == [
        SUFFIX, 2, 3, 4, 5, 6, PREFIX, 1, MIDDLE, EOD, 10, 11, 12, EOD,
        PREFIX, 13, 14, 15, 16, 17, SUFFIX, 20, 21, MIDDLE, 18, 19,
    ]
    assert transform_of(dense)(window_of(9, 3, 20), 0).tolist() == [
        1, 2, 3, MASKS[0], SEPARATOR, MASKS[0], 4, 5, END, EOD, 10, 11, 12, EOD,
        13, 14, MASKS[0], 16, 17, MASKS[1], 19, MASKS[2], 22, SEPARATOR,
        MASKS[0], 15, END, MASKS[1], 18, END, MASKS[2], 20, 21, END,
    ]
    assert transform_of(dense, seed=7)(window_of(20), 5).tolist() == [
        1, 2, MASKS[0], 4, MASKS[1], 6, MASKS[2], 9, 10, SEPARATOR,
        MASKS[0], 3, END, MASKS[1], 5, END, MASKS[2], 7, 8, END,
    ]
    # fmt: on


def test_draws_are_the_hash_of_key_and_number() -> None:
    draws = Draws("some/key")
    for number in range(3):
        digest = hashlib.blake2b(f"some/key/{number}".encode(), digest_size=8).hexdigest()
        assert draws.bits() == int(digest, 16)


def test_subsets_have_equal_chance() -> None:
    found = Counter(tuple(Draws(str(key)).subset(3, 6)) for key in range(2000))
    assert found.keys() == set(itertools.combinations(range(6), 3))
    for count in found.values():
        assert_near(count, 100)
    assert Draws("").subset(0, 5) == []
    assert Draws("").subset(5, 5) == [0, 1, 2, 3, 4]


# Configuration and errors.


def parse(**values: Any) -> Objective:
    objective: Objective = TypeAdapter(Objective).validate_python(values)
    return objective


def test_configuration_chooses_the_objective_by_its_kind() -> None:
    assert parse(kind="causal") == CausalObjective()
    assert parse(kind="fim", rate=0.9, spm_rate=0) == FimObjective(rate=0.9, spm_rate=0)
    assert parse(kind="span", mask_tokens=["<x>"]) == SpanObjective(mask_tokens=("<x>",))


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("fim", "rate", -0.1),
        ("fim", "rate", 1.1),
        ("fim", "spm_rate", 2),
        ("fim", "spm_rate", float("nan")),
        ("span", "rate", 1.5),
        ("span", "mask_ratio", 0),
        ("span", "mask_ratio", 1),
        ("span", "mean_span", 0.9),
        ("span", "mask_tokens", []),
        ("causal", "rate", 0.5),
    ],
)
def test_impossible_settings_are_refused(kind: str, field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        parse(kind=kind, **{field: value})


def test_sentinels_in_their_order() -> None:
    assert sentinels(CausalObjective()) == ()
    assert sentinels(FimObjective(suffix_token="<s>")) == (
        "<|fim_prefix|>",
        "<s>",
        "<|fim_middle|>",
    )
    assert sentinels(SpanObjective(mask_tokens=("<a>", "<b>"))) == (
        "<a>",
        "<b>",
        "<|sep|>",
        "<|eom|>",
    )
    assert sentinels(SpanObjective())[:8] == tuple(f"<|mask_{number}|>" for number in range(1, 9))


def test_the_causal_objective_needs_no_transform_and_no_token() -> None:
    def token_id(token: str) -> int | None:
        raise AssertionError(f"asked for {token}")

    assert build_transform(CausalObjective(), token_id, EOD, 0) is None


@pytest.mark.parametrize(
    ("objective", "field", "token"),
    [
        (FimObjective(prefix_token="<p>"), "prefix_token", "<p>"),
        (FimObjective(suffix_token="<s>"), "suffix_token", "<s>"),
        (FimObjective(middle_token="<m>"), "middle_token", "<m>"),
        (SpanObjective(mask_tokens=("<|mask_1|>", "<x>")), "mask_tokens", "<x>"),
        (SpanObjective(separator_token="<s>"), "separator_token", "<s>"),
        (SpanObjective(end_token="<e>"), "end_token", "<e>"),
    ],
)
def test_a_sentinel_outside_the_vocabulary_is_an_error(
    objective: FimObjective | SpanObjective, field: str, token: str
) -> None:
    tokens = [*sentinels(FimObjective()), *sentinels(SpanObjective())]
    ids = {known: FIRST_SENTINEL + number for number, known in enumerate(tokens)}
    with pytest.raises(DataError) as caught:
        build_transform(objective, ids.get, EOD, 0)
    assert str(caught.value) == (
        f"data.objective.{field}: '{token}' is not in the tokenizer's vocabulary - "
        "add it to data.tokenizer.special_tokens, or name one the tokenizer has"
    )


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            FimObjective(middle_token="<eod>"),
            "data.objective.middle_token: '<eod>' is already the end-of-document token",
        ),
        (
            FimObjective(prefix_token="<x>", suffix_token="<x>"),
            "data.objective.suffix_token: '<x>' is already a token of data.objective.prefix_token",
        ),
        (
            SpanObjective(mask_tokens=("<x>", "<y>", "<x>")),
            "data.objective.mask_tokens: '<x>' is already a token of data.objective.mask_tokens",
        ),
    ],
)
def test_a_sentinel_with_two_roles_is_an_error(
    objective: FimObjective | SpanObjective, message: str
) -> None:
    tokens = ["<eod>", "<x>", "<y>", *sentinels(FimObjective()), *sentinels(SpanObjective())]
    ids = {token: number for number, token in enumerate(tokens)}
    with pytest.raises(DataError) as caught:
        build_transform(objective, ids.get, ids["<eod>"], 0)
    assert str(caught.value) == f"{message} - each sentinel needs a token of its own"


def test_a_sentinel_may_have_id_zero() -> None:
    ids = {token: number for number, token in enumerate(sentinels(PSM))}
    transform = build_transform(PSM, ids.get, eod_id=500, seed=0)
    assert transform is not None
    assert transform(window_of(10) + 10, 0)[0] == 0
