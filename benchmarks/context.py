"""What placing documents saves of context parallelism: bytes, pairs and slots of planned rows.

    .venv/bin/python benchmarks/context.py

Rows are windows of the bytes of Python's standard library, documents and their lengths as they
are there; the plan is that of a dense decoder in bf16, whose processes compute so many FLOPs in the
time in which they send a byte. Reported for each degree, relative to rows that are cut where they
are:

- `bytes`: keys, values and their gradients that leave a process, in all layers;
- `pairs`: of a query and a key that attention computes, masked ones included;
- `slots`: of the fullest process, which all are filled up to, times the number of processes.

Nothing is run: what a plan sends is, to the byte, what tests/parallel/test_arrangement.py counts.
The seconds of planning are of one core. Writes benchmarks/results/context-<machine>.json.
"""

import json
import time
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from machine import write_result

from moebius.data.config import StdlibSource
from moebius.data.sources import documents
from moebius.model.config import ModelConfig
from moebius.model.decoder import Decoder
from moebius.parallel.arrangement import Arrangement, arrange, sequence_cost
from moebius.parallel.config import ContextConfig

ROWS, LENGTH = 64, 65_536
DEGREES = (2, 4, 8, 16)
FLOPS_PER_BYTE = (2e3, 1e4, 5e4)
MODEL = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "attention": {"num_heads": 32, "num_kv_heads": 8, "head_dim": 64},
    "ffn": {"kind": "dense", "intermediate_size": 5632},
    "depth": {"num_layers": 22},
}


def rows() -> list[list[int]]:
    """Lengths of the documents, and parts of documents, of windows drawn at random."""
    ends = np.cumsum([len(document.text.encode()) + 1 for document in documents(StdlibSource())])
    starts = np.random.default_rng(0).integers(0, ends[-1] - LENGTH, ROWS)
    found = []
    for start in starts:
        inside = ends[(ends > start) & (ends < start + LENGTH)]
        found.append(np.diff([start, *inside, start + LENGTH]).tolist())
    return found


def compared(arranged: list[Arrangement], num_ranks: int) -> dict[str, float]:
    """Sums over rows, relative to rows cut into equal runs."""
    sent = pairs = slots = 0
    for row in arranged:
        fullest = max(map(len, row.places))
        slots += fullest * num_ranks
        sent += sum(fullest * (len(group) - 1) for group in row.groups)
        pairs += sum(fullest * fullest * len(group) for group in row.groups)
    total = len(arranged) * LENGTH
    return {
        "bytes": sent / (total * (num_ranks - 1)),
        "pairs": pairs / (total * LENGTH),
        "slots": slots / total,
    }


def main() -> None:
    """Plan, compare, write."""
    with torch.device("meta"):
        decoder = Decoder(ModelConfig.model_validate(MODEL))
    room = ContextConfig().room
    lengths = rows()
    results = {}
    for degree, flops_per_byte in product(DEGREES, FLOPS_PER_BYTE):
        cost = sequence_cost(decoder, degree, LENGTH, flops_per_byte, torch.bfloat16)
        cost = replace(cost, max_tokens_per_rank=int(room * LENGTH / degree))
        begin = time.perf_counter()
        arranged = [arrange(row, degree, cost) for row in lengths]
        seconds = (time.perf_counter() - begin) / ROWS
        name = f"cp {degree}, {flops_per_byte:.0f} FLOPs per byte"
        results[name] = compared(arranged, degree) | {"planning_seconds_per_row": seconds}
    sizes = sorted(size for row in lengths for size in row)
    report = {
        "rows": ROWS,
        "row_length": LENGTH,
        "documents_per_row": len(sizes) / ROWS,
        "length_of_documents": {"median": sizes[len(sizes) // 2], "largest": sizes[-1]},
        "model": MODEL,
        "room": room,
        "relative_to_rows_cut_where_they_are": results,
    }
    print(json.dumps(results, indent=1))
    write_result("context", report)


if __name__ == "__main__":
    main()
