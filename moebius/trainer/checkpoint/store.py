"""The checkpoints of one run folder."""

import re
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moebius.errors import CheckpointError
from moebius.trainer.checkpoint.commit import CommitRecord, publish, read_record, seal

STEP_FOLDER = re.compile(r"step-\d{8,}")
Tensors = dict[str, dict[str, Tensor]]
"""file stem -> name -> tensor"""


class CheckpointStore:
    """Saves, finds and loads `step-<n>` folders below `root`; keeps the newest `keep`."""

    def __init__(self, root: Path, keep: int) -> None:
        self.root = root
        self.keep = keep

    def save(self, record: CommitRecord, tensors: Tensors) -> Path:
        """Write a checkpoint that either exists whole or not at all, then drop the oldest ones.

        A checkpoint of that step that is already there stays: a run has one state per step.
        """
        final = self.root / f"step-{record.step:08}"
        if final.exists():
            return final
        temporary = final.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for stem, group in tensors.items():
            contiguous = {name: tensor.contiguous() for name, tensor in group.items()}
            path = temporary / f"{stem}.safetensors"
            try:
                save_file(contiguous, path)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"checkpoint: cannot write '{path}': {error}") from error
        seal(temporary, record)
        publish(temporary, final)
        for old in self.checkpoints()[: -self.keep]:
            shutil.rmtree(old)
        return final

    def checkpoints(self) -> list[Path]:
        """Folders of finished checkpoints, oldest first; other names are not touched."""
        found = [path for path in self.root.glob("step-*") if STEP_FOLDER.fullmatch(path.name)]
        return sorted(found, key=step_of)

    def find(self, step: int | None = None) -> Path | None:
        """The checkpoint of a step, by default the newest; None where the run has none yet.

        Raises CheckpointError where the asked step is not there.
        """
        found = self.checkpoints()
        if step is None:
            return found[-1] if found else None
        path = self.root / f"step-{step:08}"
        if path not in found:
            steps = ", ".join(str(step_of(path)) for path in found)
            raise CheckpointError(f"no checkpoint of step {step} in '{self.root}'; there: {steps}")
        return path

    def load(self, folder: Path) -> tuple[CommitRecord, Tensors]:
        """Verify and read a checkpoint. Raises CheckpointError where a file is damaged."""
        record = read_record(folder)
        tensors = {Path(name).stem: load_file(folder / name) for name in record.files}
        for stem in ("model", "optimizer"):
            if stem not in tensors:
                raise CheckpointError(f"checkpoint '{folder}' holds no {stem}.safetensors")
        return record, tensors


def step_of(folder: Path) -> int:
    """The optimizer step of a checkpoint folder."""
    return int(folder.name.removeprefix("step-"))
