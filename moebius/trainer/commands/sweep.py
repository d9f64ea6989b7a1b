"""moebius sweep: a recursive checkpoint with other numbers of passes and other shares of tokens."""

import argparse
from itertools import chain

from rich.console import Console
from rich.table import Table

from moebius.data.build import validation_readers
from moebius.data.stream import validation_batches
from moebius.model.context import StepContext
from moebius.model.ledger import Ledger
from moebius.trainer.commands.arguments import add_run_arguments, positive, whole
from moebius.trainer.restore import restore
from moebius.trainer.sweep import best_settings, settings, sweep


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`moebius sweep RUN [--recursions N ...] [--scales X ...]`."""
    add_run_arguments(parser)
    parser.add_argument("--num-batches", type=whole(1), help="default: the run's", metavar="N")
    parser.add_argument(
        "--recursions", type=whole(1), nargs="+", help="default: 1 to the trained", metavar="N"
    )
    parser.add_argument(
        "--scales",
        type=positive,
        nargs="+",
        default=[0.5, 1.0, 1.5],
        help="factors on the shares of tokens that passes choose; default: 0.5 1 1.5",
        metavar="X",
    )


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Print the loss of each setting, and what choosing one for each sample could reach."""
    model = restore(arguments.run, arguments.step, arguments.device)
    config = model.config
    chosen = list(settings(config.model, arguments.recursions, arguments.scales))
    readers = validation_readers(config.data, model.corpora, {})
    num_batches = arguments.num_batches or config.evaluation.num_batches
    batches = chain.from_iterable(
        validation_batches(reader, config.train.batch_size, num_batches)
        for reader in readers.values()
    )
    step = StepContext("threshold", Ledger(), model.step, config.train.seed)
    outcomes = sweep(model.executor, batches, chosen, model.device, step)
    bound, wins = best_settings(outcomes)
    causal, _ = best_settings([o for o in outcomes if o.setting.mode == "threshold"])
    table = Table(title=f"step {model.step}, {int(wins.sum())} samples")
    for column in ("setting", "selects", "loss", "MFLOP/tok", "best for"):
        table.add_column(column, justify="right", no_wrap=True)
    for outcome, count in zip(outcomes, wins.tolist(), strict=True):
        selects = "looking ahead" if outcome.setting.mode == "topk" else "causally"
        table.add_row(
            str(outcome.setting),
            selects,
            f"{outcome.loss:.4f}",
            f"{outcome.flops_per_token / 1e6:,.2f}",
            f"{count / int(wins.sum()):.0%}",
        )
    console.print(table)
    line = f"with the best setting for each sample: {causal:.4f}"
    if any(outcome.setting.mode == "topk" for outcome in outcomes):
        line += f" selecting causally, {bound:.4f} with those that look ahead"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0
