"""What the data room costs beside what it feeds, and beside the usual recipe.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/data.py

Writes benchmarks/results/data-<machine>.json: tokens/s of the stream and of the quickstart model on
one core; MB/s of `prepare` and of `datasets.map` with a fast tokenizer of transformers, on all
cores; peak memory of both ends while the corpus grows tenfold; seconds that a resumed run waits for
its first batch on a corpus of ten million documents. Takes about ten minutes and 3 GB of disk.
"""

import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from machine import ROOT, write_result

from moebius.data.build import build_stream
from moebius.data.config import DataConfig, FilesSource, StdlibSource
from moebius.data.corpus import open_corpora
from moebius.data.manifest import Manifest, ShardEntry, Split, TokenizerEntry, write_manifest
from moebius.data.prepare import Workshop, prepare
from moebius.data.shards import ShardWriter
from moebius.data.sources import documents
from moebius.data.stream import Stream
from moebius.files import file_sha256

CORES = len(os.sched_getaffinity(0))
LENGTH, BATCH = 256, 8
"""of configs/quickstart.yaml"""
MANY_DOCUMENTS = 10_000_000


def in_process(action: Callable[..., Any], *arguments: Any) -> Any:
    """What an action gives in a fresh process, which has imported nothing for others."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:  # whose worker may have children
        return pool.submit(action, *arguments).result()


def peak_bytes() -> int:
    """Highest resident memory of this process and of the largest of its children."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(resource.getrusage(kind).ru_maxrss for kind in kinds) * 1024


def anonymous_bytes() -> int:
    """Memory of this process that is not mapped from files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


# The corpus: the standard library, one document for each block of a module.


def write_corpus(path: Path, copies: int) -> int:
    """A jsonl file; gives the bytes of its text."""
    size = 0
    with path.open("w") as file:
        for copy in range(copies):
            for document in documents(StdlibSource()):
                for block in document.text.split("\n\n\n"):
                    text = f"{block}\n# {copy}\n"
                    size += len(text.encode())
                    file.write(json.dumps({"text": text}) + "\n")
    return size


def config_of(folder: Path, source: Path, tokenizer: Path | None = None, **more: Any) -> DataConfig:
    """Data of the quickstart's shape."""
    return DataConfig(
        dir=str(folder),
        source=FilesSource(paths=(str(source),)),
        sequence_length=LENGTH,
        tokenizer={"path": str(tokenizer)} if tokenizer else {},
        **more,
    )


def quiet(processes: int = CORES) -> Workshop:
    """Tools that say nothing."""
    return Workshop(lambda line: None, processes=processes)


# Speed of the stream.


def stream_rate(config: DataConfig, seconds: float = 5.0) -> float:
    """Tokens/s of batches made one after the other by one thread."""
    stream = build_stream(config, open_corpora(config), BATCH, 0, {})
    stream.take([(0, BATCH)])
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        stream.take([(0, BATCH)])
        count += 1
    rate = count * BATCH * LENGTH / (time.perf_counter() - began)
    stream.close()
    return rate


def model_rate(folder: Path) -> float:
    """Tokens/s that the quickstart model trains on one core."""
    import torch

    torch.set_num_threads(1)
    from moebius.trainer.cli import main

    run = folder / "run"
    main(
        [
            "train",
            str(ROOT / "configs" / "quickstart.yaml"),
            f"run_dir={run}",
            f"data.dir={folder / 'data'}",
            "data.source=null",
            "train.num_steps=40",
            "log.interval=10",
            "evaluation.num_batches=1",
        ]
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [line["speed/tokens_per_second"] for line in lines if "speed/tokens_per_second" in line]
    return statistics.median(rates[1:])


# Speed and memory of preparing.


def prepare_seconds(config: DataConfig, processes: int) -> tuple[float, int]:
    """Seconds and peak memory."""
    began = time.perf_counter()
    prepare(config, 4096, quiet(processes))
    return time.perf_counter() - began, peak_bytes()


def recipe_seconds(source: Path, tokenizer: Path, cache: Path, processes: int) -> float:
    """The usual way: load, map with a batched tokenizer, keep the ids."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import datasets
    from transformers import PreTrainedTokenizerFast

    tokenize = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
    began = time.perf_counter()
    rows = datasets.load_dataset(
        "json", data_files=str(source), split="train", cache_dir=str(cache)
    )
    rows.map(
        lambda batch: {"input_ids": tokenize(batch["text"])["input_ids"]},
        batched=True,
        num_proc=processes,
        remove_columns=["text"],
    )
    return time.perf_counter() - began


def reading_memory(config: DataConfig) -> int:
    """Anonymous memory that a stream adds by going through two thousand batches."""
    before = anonymous_bytes()
    stream = build_stream(config, open_corpora(config), BATCH, 0, {})
    for _ in range(2000):
        stream.take([(0, BATCH)])
    stream.close()
    return anonymous_bytes() - before


# A resume in the middle of many documents.


def write_many(folder: Path, tokenizer: Path) -> None:
    """Ten million short documents of random tokens, about a hundred million tokens a shard."""
    chance = np.random.default_rng(0)
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    entries: list[ShardEntry] = []
    shards = 10
    for number in range(shards):
        writer = ShardWriter(folder / f"train-{number:05}", 4096)
        lengths = np.minimum(1 + chance.geometric(1 / 60, MANY_DOCUMENTS // shards), 3000)
        tokens = chance.integers(1, 4096, int(lengths.sum()), dtype=np.uint16)
        ends = np.cumsum(lengths)
        tokens[ends - 1] = 0
        for start, end in zip((ends - lengths).tolist(), ends.tolist(), strict=True):
            writer.write(tokens[start:end])
        entries.append(writer.close())
    held_out = ShardWriter(folder / "validation-00000", 4096)
    held_out.write(np.append(chance.integers(1, 4096, 10_000), 0))
    manifest = Manifest(
        recipe={},
        tokenizer=TokenizerEntry(sha256=file_sha256(tokenizer), vocab_size=4096, eod_id=0),
        dtype="uint16",
        splits={
            "train": Split(bytes=1, shards=entries),
            "validation": Split(bytes=1, shards=[held_out.close()]),
        },
    )
    write_manifest(folder, manifest)


def resume_seconds(config: DataConfig) -> float:
    """From the config to the first batch at a position in the middle of the second epoch."""
    began = time.perf_counter()
    stream: Stream = build_stream(config, open_corpora(config), 512, 0, {})
    stream.load(int(1.5 * sum(stream.num_samples or [0])), {})
    stream.take([(0, 512)])
    seconds = time.perf_counter() - began
    stream.close()
    return seconds


def main() -> None:
    """Measure everything in one run."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        small, large = root / "small.jsonl", root / "large.jsonl"
        sizes = {small: write_corpus(small, 1), large: write_corpus(large, 10)}
        result: dict[str, Any] = {"text_megabytes": sizes[small] / 1e6}
        base = config_of(root / "data", small)
        prepare(base, 4096, quiet())
        tokenizer = root / "data" / "tokenizer.json"

        model = in_process(model_rate, root)
        streams = {
            "concat": base,
            "best_fit": base.model_copy(update={"packing": "best_fit"}),
        }
        rates = {name: in_process(stream_rate, config) for name, config in streams.items()}
        result["stream"] = {
            "model_tokens_per_second": model,
            "stream_tokens_per_second": rates,
            "ratio": {name: rate / model for name, rate in rates.items()},
        }

        preparing: dict[str, list[float]] = {"moebius": [], "map": []}
        for turn in range(3):  # in turn, so that a slow minute of the machine meets both
            own = config_of(root / f"own-{turn}", small, tokenizer)
            preparing["moebius"].append(in_process(prepare_seconds, own, CORES)[0])
            cache = root / f"map-{turn}"
            preparing["map"].append(in_process(recipe_seconds, small, tokenizer, cache, CORES))
        medians = {name: statistics.median(seconds) for name, seconds in preparing.items()}
        result["prepare"] = {
            "seconds": preparing,
            "megabytes_per_second": {n: sizes[small] / 1e6 / s for n, s in medians.items()},
            "ratio": medians["map"] / medians["moebius"],
        }

        memory: dict[str, Any] = {}
        for label, source in {"1x": small, "10x": large}.items():
            config = config_of(root / f"memory-{label}", source, tokenizer)
            _, peak = in_process(prepare_seconds, config, CORES)
            memory[label] = {
                "prepare_peak_megabytes": peak / 1e6,
                "stream_megabytes": {
                    kind: in_process(reading_memory, config.model_copy(update={"packing": kind}))
                    / 1e6
                    for kind in ("concat", "best_fit")
                },
            }
        result["memory"] = memory

        many = root / "many"
        many.mkdir()
        in_process(write_many, many, tokenizer)
        config = DataConfig(dir=str(many), source=None, sequence_length=LENGTH)
        packed = config.model_copy(update={"packing": "best_fit"})
        result["resume_at_ten_million_documents_seconds"] = {
            "concat": in_process(resume_seconds, config),
            "best_fit_first_time": in_process(resume_seconds, packed),
            "best_fit": in_process(resume_seconds, packed),
        }
    print(json.dumps(write_result("data", result), indent=1))


if __name__ == "__main__":
    main()
