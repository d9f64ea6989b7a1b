"""Damaged shards, found before training, so that all processes leave out the same ones."""

from collections.abc import Callable

from moebius.data.corpus import Corpora
from moebius.data.shards import Shard


def find_bad_shards(corpora: Corpora, report: Callable[[str], None]) -> dict[str, list[str]]:
    """Corpus -> names of its shards that are not what was prepared; every byte is read."""
    found: dict[str, list[str]] = {}
    for name, corpus in corpora.members.items():
        vocab_size = corpus.manifest.tokenizer.vocab_size
        for split in corpus.manifest.splits.values():
            for entry in split.shards:
                fault = Shard(corpus.storage, entry, vocab_size).fault()
                if fault is not None:
                    report(f"quarantined: shard file '{fault.file}' {fault.reason}")
                    found.setdefault(name, []).append(entry.name)
    return found
