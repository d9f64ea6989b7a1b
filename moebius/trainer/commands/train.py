"""moebius train: prepare the corpus, train, say what to do next."""

import argparse
import shlex
from functools import partial

from rich.console import Console

from moebius.data.prepare import prepare
from moebius.parallel.world import check_world_size
from moebius.trainer.callbacks.checkpointing import CheckpointCallback
from moebius.trainer.callbacks.console import ConsoleCallback
from moebius.trainer.callbacks.evaluation import EvaluationCallback
from moebius.trainer.callbacks.interrupt import InterruptCallback
from moebius.trainer.callbacks.metrics import MetricsCallback
from moebius.trainer.callbacks.routing_recorder import RoutingRecorder
from moebius.trainer.callbacks.sinks import JsonlSink, TensorBoardSink
from moebius.trainer.config_file import load_config
from moebius.trainer.loop import train
from moebius.trainer.run import Run, check_folder, claim_folder, lock_folder

SIGNAL_EXIT_BASE = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`moebius train CONFIG [path.to.option=value ...]`."""
    parser.add_argument("config", help="run file, for example configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", help="options of the file, as optim.lr=3e-4")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Train to the last step (exit code 0) or to an interruption (128 + signal number)."""
    config = load_config(arguments.config, arguments.overrides)
    check_world_size()
    check_folder(config)
    manifest = prepare(config.data, config.model.vocab_size, partial(_print, console))
    callbacks = [
        InterruptCallback(),
        ConsoleCallback(console),
        JsonlSink(),
        TensorBoardSink(),
        MetricsCallback(),
        EvaluationCallback(),
        RoutingRecorder(),
        CheckpointCallback(),
    ]
    training = Run(config, manifest, callbacks)
    # Only now: a run that could not be built leaves no trace in the folder.
    with lock_folder(training.folder):
        training.resume()
        claim_folder(config)
        train(training)
    again = shlex.join(["moebius", "train", arguments.config, *arguments.overrides])
    folder = training.folder
    interrupted = training.step < config.train.num_steps
    lines = [f"curves:   tensorboard --logdir {folder / 'tensorboard'}"]
    if interrupted:
        lines.append(f"stopped at step {training.step} of {config.train.num_steps}")
    else:
        lines.append(f"generate: moebius generate {folder} --prompt 'def '")
        lines.append(f"evaluate: moebius evaluate {folder}")
    lines.append(f"resume:   {again}   (continues after step {training.step} from {folder})")
    for line in lines:
        _print(console, line)
    return SIGNAL_EXIT_BASE + (training.stop_signal or 0) if interrupted else 0


def _print(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
