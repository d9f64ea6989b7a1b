"""moebius evaluate: the validation loss of a run's checkpoint."""

import argparse

from rich.console import Console

from moebius.data.build import corpus_weights, mixture_turns, validation_readers
from moebius.trainer.callbacks.console import evaluation_line
from moebius.trainer.commands.arguments import add_run_arguments, whole
from moebius.trainer.evaluation import evaluate_corpora
from moebius.trainer.restore import restore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`moebius evaluate RUN [--step N] [--num-batches N]`."""
    add_run_arguments(parser)
    parser.add_argument("--num-batches", type=whole(1), help="default: the run's", metavar="N")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Evaluate on the beginning of the validation split, as during training."""
    model = restore(arguments.run, arguments.step, arguments.device)
    config = model.config
    turns = mixture_turns(config.data, model.corpora, config.train.seed)
    metrics = evaluate_corpora(
        model.executor,
        validation_readers(config.data, model.corpora, {}),
        corpus_weights(turns, config.data, model.position),
        config.train.batch_size,
        arguments.num_batches or config.evaluation.num_batches,
        model.token_bytes_V,
        model.device,
        model.step,
        config.train.seed,
    )
    console.print(
        f"step {model.step} | {evaluation_line(metrics)}", highlight=False, soft_wrap=True
    )
    return 0
