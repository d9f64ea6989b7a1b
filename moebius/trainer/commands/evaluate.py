"""moebius evaluate: the validation loss of a run's checkpoint."""

import argparse
from pathlib import Path

from rich.console import Console

from moebius.data.stream import SplitReader, validation_batches
from moebius.trainer.callbacks.console import evaluation_line
from moebius.trainer.commands.arguments import add_run_arguments, whole
from moebius.trainer.evaluation import evaluate
from moebius.trainer.restore import restore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`moebius evaluate RUN [--step N] [--num-batches N]`."""
    add_run_arguments(parser)
    parser.add_argument("--num-batches", type=whole(1), help="default: the run's", metavar="N")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Evaluate on the beginning of the validation split, as during training."""
    model = restore(arguments.run, arguments.step, arguments.device)
    config = model.config
    reader = SplitReader(
        Path(config.data.dir), model.manifest, "validation", config.data.sequence_length
    )
    num_batches = arguments.num_batches or config.evaluation.num_batches
    batches = validation_batches(reader, config.train.batch_size, num_batches)
    metrics = evaluate(
        model.executor,
        batches,
        model.token_bytes_V,
        model.device,
        model.step,
        config.train.seed,
    )
    console.print(
        f"step {model.step} | {evaluation_line(metrics)}", highlight=False, soft_wrap=True
    )
    return 0
