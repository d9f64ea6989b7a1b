"""moebius evaluate: the validation loss of a run's checkpoint."""

import argparse
from pathlib import Path

from rich.console import Console

from moebius.data.stream import SplitReader, validation_batches
from moebius.trainer.callbacks.console import evaluation_line
from moebius.trainer.evaluation import evaluate
from moebius.trainer.restore import restore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`moebius evaluate RUN [--step N] [--num-batches N]`."""
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--step", type=int, help="checkpoint to use; default: the newest")
    parser.add_argument("--num-batches", type=int, help="default: the run's")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Evaluate on the beginning of the validation split, as during training."""
    model = restore(arguments.run, arguments.step)
    config = model.config
    reader = SplitReader(
        Path(config.data.dir), model.manifest, "validation", config.data.sequence_length
    )
    num_batches = arguments.num_batches or config.evaluation.num_batches
    batches = validation_batches(reader, config.train.batch_size, num_batches)
    metrics = evaluate(model.executor, batches, reader.bytes_per_token, model.device)
    console.print(
        f"step {model.step} | {evaluation_line(metrics)}", highlight=False, soft_wrap=True
    )
    return 0
