"""A run folder: whose it is, and who trains there."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml

from moebius.errors import CheckpointError
from moebius.files import exclusive, write_whole
from moebius.trainer.config import RunConfig, identity
from moebius.trainer.config_file import load_config

CONFIG_NAME = "config.yaml"
TRIES = 3
"""to lock a folder: `is_locked` holds the lock for a moment"""


def check_folder(config: RunConfig) -> None:
    """Raise CheckpointError, naming the differing fields, where the folder holds another run."""
    path = Path(config.run_dir) / CONFIG_NAME
    if path.exists():
        check_same_run(config, load_config(path), Path(config.run_dir))


def differences(config: RunConfig, found: RunConfig) -> list[str]:
    """The settings in which a config is another run's than one that was found, as old -> new."""
    wanted, there = identity(config), identity(found)
    return [
        f"{name}: {there.get(name)} -> {wanted.get(name)}"
        for name in sorted(there.keys() | wanted.keys())
        if there.get(name) != wanted.get(name)
    ]


def check_same_run(config: RunConfig, found: RunConfig, where: Path | str) -> None:
    """Raise CheckpointError where `found`, read at `where`, is the config of another run."""
    changes = differences(config, found)
    if changes:
        raise CheckpointError(
            f"run_dir: '{where}' belongs to another config ({'; '.join(changes)})",
            "choose another run_dir, or train with --allow-changes",
        )


def check_mixture(config: RunConfig, found: RunConfig, tokens: int) -> None:
    """Raise CheckpointError where phases that a run has gone through were other ones."""
    past = [
        [phase.model_dump() for phase in node.data.mixture if phase.from_tokens < max(tokens, 1)]
        for node in (found, config)
    ]
    if past[0] != past[1]:
        raise CheckpointError(
            f"data.mixture: the {tokens:,} tokens of the checkpoint had the phases {past[0]}, the "
            f"config says {past[1]}",
            "leave these as they were, and add a phase that begins later",
        )


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep a run folder to this process; two would delete each other's checkpoints.

    Raises CheckpointError where another process trains there. The lock ends with the process,
    however it ends.
    """
    with ExitStack() as stack:
        for number in range(TRIES):
            try:
                stack.enter_context(exclusive(folder / "lock"))
                break
            except BlockingIOError:
                if number == TRIES - 1:
                    raise CheckpointError(
                        f"run_dir: '{folder}' is being trained by another process",
                        "wait for it, stop it, or choose another run_dir",
                    ) from None
                time.sleep(0.05)
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process trains there now, as far as locks of files reach."""
    if not (folder / "lock").exists():
        return False
    try:
        with exclusive(folder / "lock"):
            return False
    except BlockingIOError:
        return True


def claim_folder(config: RunConfig) -> None:
    """Write the resolved config into the run folder, whose owner it is from now on.

    Corpora and checkpoints are named by absolute paths, so that commands find them from any working
    directory.
    """
    path = Path(config.run_dir) / CONFIG_NAME
    tree = config.model_dump(mode="json")
    for node in (tree["data"], *tree["data"]["corpora"].values(), tree["checkpoint"]):
        if node["dir"] is not None and "://" not in node["dir"]:
            node["dir"] = os.path.abspath(node["dir"])
    write_whole(path, yaml.safe_dump(tree, sort_keys=False))
