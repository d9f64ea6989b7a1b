"""Checkpoints from which a run has crashed again and again, before it wrote the next one."""

from pathlib import Path

from pydantic import NonNegativeInt, PositiveInt

from moebius.config import ConfigNode
from moebius.files import write_whole

FILE_NAME = "starts.json"


class Starts(ConfigNode):
    """How often in a row a run was started from the same checkpoint."""

    step: NonNegativeInt
    count: PositiveInt


def note_start(folder: Path, step: int) -> int:
    """Note that a run starts from a checkpoint; how many starts in a row this makes."""
    before = _read(folder / FILE_NAME)
    count = before.count + 1 if before is not None and before.step == step else 1
    write_whole(folder / FILE_NAME, Starts(step=step, count=count).model_dump_json())
    return count


def crashed(folder: Path, step: int) -> int:
    """Starts in a row from a checkpoint, all of which have ended in a crash."""
    before = _read(folder / FILE_NAME)
    return before.count if before is not None and before.step == step else 0


def note_progress(folder: Path) -> None:
    """The run has come further than the checkpoint it started from, or ended as it should."""
    (folder / FILE_NAME).unlink(missing_ok=True)


def _read(path: Path) -> Starts | None:
    """A file that is damaged tells nothing."""
    try:
        return Starts.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None
