"""moebius inspect: what a prepared corpus holds: documents, lengths, samples as text."""

import argparse
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moebius.data.corpus import Corpus, SplitReader
from moebius.data.manifest import TOKENIZER_NAME, Split
from moebius.data.shards import Shard
from moebius.data.tokenizer import load_tokenizer
from moebius.errors import ConfigError, DataError
from moebius.trainer.commands.arguments import whole

QUANTILES = (0, 10, 50, 90, 99, 100)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`moebius inspect DIR [--split NAME] [--samples N] [--verify]`."""
    parser.add_argument("dir", help="folder of a prepared corpus, or its URL")
    parser.add_argument("--split", default="train", help="train (default) or validation")
    parser.add_argument(
        "--samples", type=whole(0), default=3, help="samples to print (default: 3)", metavar="N"
    )
    parser.add_argument(
        "--first", type=whole(0), default=0, help="number of the first one", metavar="N"
    )
    parser.add_argument(
        "--sequence-length", type=whole(1), default=64, help="tokens of a sample", metavar="N"
    )
    parser.add_argument(
        "--packing", choices=("concat", "best_fit"), default="concat", help="default: concat"
    )
    parser.add_argument("--verify", action="store_true", help="read and check every byte")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Print a table of the splits, the lengths of documents, and samples."""
    corpus = Corpus.open(arguments.dir)
    if arguments.split not in corpus.manifest.splits:
        raise ConfigError(
            f"--split: '{arguments.split}'; allowed: {', '.join(corpus.manifest.splits)}"
        )
    if arguments.verify:
        verify(corpus)
    console.print(splits_table(corpus))
    _samples(corpus, arguments, console)
    return 0


def verify(corpus: Corpus) -> None:
    """Raise DataError where a shard is not what was prepared."""
    for split in corpus.manifest.splits.values():
        for entry in split.shards:
            fault = Shard(corpus.storage, entry, corpus.manifest.tokenizer.vocab_size).fault()
            if fault is not None:
                raise DataError(
                    f"data: shard file '{corpus.storage.folder / fault.file}' {fault.reason}",
                    "fetch the file again, or delete its folder to rebuild",
                )


def splits_table(corpus: Corpus) -> Table:
    """Size of each split, and quantiles of the lengths of its documents in tokens."""
    manifest = corpus.manifest
    vocab_size = manifest.tokenizer.vocab_size
    table = Table("", *manifest.splits, title=Text(corpus.storage.location))
    lengths = [
        np.concatenate(
            [Shard(corpus.storage, entry, vocab_size).lengths() for entry in split.shards]
        )
        for split in manifest.splits.values()
    ]
    rows: dict[str, Callable[[Split], str]] = {
        "documents": lambda split: f"{split.documents:,}",
        "tokens": lambda split: f"{split.tokens:,}",
        "bytes of text": lambda split: f"{split.bytes:,}",
        "bytes per token": lambda split: f"{split.bytes / split.tokens:.2f}",
        "shards": lambda split: str(len(split.shards)),
    }
    for name, value in rows.items():
        table.add_row(name, *(value(split) for split in manifest.splits.values()))
    for quantile in QUANTILES:
        name = {0: "shortest", 100: "longest"}.get(quantile, f"{quantile} % are within")
        table.add_row(name, *(f"{np.percentile(split, quantile):,.0f}" for split in lengths))
    table.caption = f"{vocab_size:,} token ids; lengths in tokens, end-of-document token included"
    return table


def _samples(corpus: Corpus, arguments: argparse.Namespace, console: Console) -> None:
    if not arguments.samples:
        return
    reader = SplitReader(corpus, arguments.split, arguments.sequence_length, arguments.packing)
    tokenizer = load_tokenizer(corpus.storage.folder / TOKENIZER_NAME)
    last = min(arguments.first + arguments.samples, reader.num_samples)
    console.print(f"{reader.num_samples:,} samples of {arguments.sequence_length} tokens")
    for number in range(arguments.first, last):
        parts = [
            tokenizer.decode(window[1:].tolist(), skip_special_tokens=False)
            for window in reader.sample(number)
        ]
        console.print(f"--- {number}, {len(parts)} parts", highlight=False, markup=False)
        for part in parts:
            console.print(part, highlight=False, markup=False, soft_wrap=True)
