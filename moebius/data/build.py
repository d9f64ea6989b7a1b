"""From the configuration of the data to the readers and the stream of a run."""

from collections.abc import Collection, Mapping

from moebius.data.config import DataConfig, HubStreamSource
from moebius.data.corpus import Corpora, SplitReader
from moebius.data.live import LiveStream, Text
from moebius.data.mixture import Turns
from moebius.data.objective import build_transform
from moebius.data.order import BlockShuffle
from moebius.data.stream import Stream, TrainStream
from moebius.data.tokenizer import load_tokenizer
from moebius.errors import DataError

Quarantined = Mapping[str, Collection[str]]
"""corpus -> names of its shards that are not read"""


def validation_readers(
    config: DataConfig, corpora: Corpora, quarantined: Quarantined
) -> dict[str, SplitReader]:
    """By name, the held-out text of each corpus."""
    return {
        name: SplitReader(
            corpus, "validation", config.sequence_length, quarantined=quarantined.get(name, ())
        )
        for name, corpus in corpora.members.items()
    }


def build_stream(
    config: DataConfig, corpora: Corpora, batch_size: int, seed: int, quarantined: Quarantined
) -> Stream:
    """The training stream of a run, at its beginning. Raises DataError where it cannot be read."""
    stream: Stream
    if isinstance(config.source, HubStreamSource):
        stream = _live(config, config.source, corpora, batch_size, seed)
    else:
        stream = _prepared(config, corpora, batch_size, seed, quarantined)
    tokenizer = load_tokenizer(corpora.tokenizer_file)
    stream.mask_documents = config.mask_documents
    stream.transform = build_transform(
        config.objective, tokenizer.token_to_id, corpora.tokenizer.eod_id, seed
    )
    return stream


def mixture_turns(config: DataConfig, corpora: Corpora, seed: int) -> Turns | None:
    """Whose turn it is when in a mixture; None: there is one corpus."""
    if not config.corpora:
        return None
    names = list(config.corpora)
    sizes = {name: corpora.members[name].manifest.splits["train"].tokens for name in names}
    phases = [(phase.from_tokens, phase.weights) for phase in config.mixture]
    length = config.sequence_length
    return Turns(
        [
            (-(-first // length), [float(weights.get(name, 0)) for name in names])
            for first, weights in phases or [(0, {name: float(sizes[name]) for name in names})]
        ],
        seed,
    )


def corpus_weights(turns: Turns | None, config: DataConfig, position: int) -> dict[str, float]:
    """By name, the share of each corpus at a position."""
    if turns is None:
        return {"": 1.0}
    return dict(zip(config.corpora, turns.weights(position).tolist(), strict=True))


def _prepared(
    config: DataConfig, corpora: Corpora, batch_size: int, seed: int, quarantined: Quarantined
) -> TrainStream:
    readers = []
    for name, corpus in corpora.members.items():
        if "train" not in corpus.manifest.splits:
            raise DataError(
                f"data.dir: '{corpus.storage.folder}' has no training split, it belongs to a "
                "corpus that is streamed",
                "choose another data.dir, or the data.source it was made from",
            )
        readers.append(
            SplitReader(
                corpus,
                "train",
                config.sequence_length,
                config.packing,
                quarantined.get(name, ()),
            )
        )
        if corpus.storage.is_remote:
            _check_cache(config, readers[-1])
    return TrainStream(
        readers,
        batch_size,
        seed,
        config.shuffle,
        mixture_turns(config, corpora, seed),
        config.prefetch,
        config.workers,
    )


def _check_cache(config: DataConfig, reader: SplitReader) -> None:
    """Raise DataError where shards would be fetched again and again."""
    limit = config.cache.max_gigabytes * 1e9
    sizes = [shard.num_bytes for shard in reader.shards]
    if isinstance(config.shuffle, BlockShuffle):
        # A run of neighbouring samples lies in few shards; blocks follow each other.
        shuffle = config.shuffle
        runs = 2 * (shuffle.block // shuffle.run + 1)
        tokens = shuffle.run * config.sequence_length
        per_run = 2 + tokens * reader.shards[0].dtype.itemsize // max(sizes)
        needed = min(sum(sizes), runs * per_run * max(sizes))
    else:
        needed = sum(sizes)
    if config.shuffle.kind != "none" and needed > limit:
        raise DataError(
            f"data.shuffle: '{config.shuffle.kind}' uses {needed / 1e9:.1f} GB of shards of "
            f"'{reader.storage.location}' at a time, data.cache.max_gigabytes is "
            f"{config.cache.max_gigabytes}",
            "raise it, or use data.shuffle={kind: blocks} with fewer runs in a block",
        )


def _live(
    config: DataConfig, source: HubStreamSource, corpora: Corpora, batch_size: int, seed: int
) -> LiveStream:
    text = Text(
        source, corpora.tokenizer_file, corpora.tokenizer.eod_id, config.validation_fraction
    )
    block = config.shuffle.block if isinstance(config.shuffle, BlockShuffle) else 1
    return LiveStream(text, config.sequence_length, block, batch_size, seed, config.prefetch)
