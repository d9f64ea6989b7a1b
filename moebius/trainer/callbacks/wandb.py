"""Published numbers for Weights & Biases."""

from __future__ import annotations

import secrets
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moebius.errors import ConfigError
from moebius.files import write_whole
from moebius.parallel.together import together
from moebius.parallel.world import is_main
from moebius.trainer.callbacks.base import Callback
from moebius.trainer.config import WandbConfig

if TYPE_CHECKING:
    from moebius.trainer.run import Run

ID_FILE = "wandb.id"
"""in the run folder: under which name the server knows the run"""


def import_wandb() -> Any:
    """The package. Raises ConfigError where it is not installed."""
    try:
        return import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            f"log.wandb: the package wandb cannot be imported ({error})",
            "pip install 'moebius[wandb]', or set log.wandb to null",
        ) from None


class WandbSink(Callback):
    """Numbers and heat maps of a run at wandb.ai, or, `mode: offline`, in its folder for
    `wandb sync`; the first process sends them.

    A resumed run goes on under its id. The server keeps what it has: steps that are made again are
    not stored twice.
    """

    name = "wandb"
    priority = 5  # before there is a live view: wandb may ask who is there

    def __init__(self, config: WandbConfig) -> None:
        self.config = config
        self.wandb = import_wandb()
        self.session: Any = None
        self.ended = False

    def on_start(self, run: Run) -> None:
        """Begin, or go on; a collective call. Raises ConfigError where that is not possible."""
        together(lambda: self._begin(run) if is_main() else None, ConfigError)

    def _begin(self, run: Run) -> None:
        path = run.folder / ID_FILE
        if not path.exists():
            write_whole(path, secrets.token_hex(8))
        try:
            self.session = self.wandb.init(
                project=self.config.project,
                entity=self.config.entity,
                name=self.config.name or run.folder.name,
                mode=self.config.mode,
                id=path.read_text(),
                resume="allow",
                dir=run.folder,
                config=run.config.model_dump(mode="json"),
                settings=self.wandb.Settings(console="off", silent=True),
            )
        except self.wandb.Error as error:
            message = " ".join(str(error).split())
            remedy = "log in (wandb login), or set log.wandb.mode=offline"
            hint = remedy if self.config.mode == "online" else None
            raise ConfigError(f"log.wandb: {message}", hint) from None

    def on_metrics(self, run: Run, metrics: dict[str, float]) -> None:
        """Send numbers of the optimizer step."""
        if self.session is not None:
            self.session.log(metrics, step=run.step)

    def on_picture(self, run: Run, name: str, image_HWC: Tensor) -> None:
        """Send an image of the optimizer step."""
        if self.session is not None:
            self.session.log({name: self.wandb.Image(image_HWC.numpy())}, step=run.step)

    def on_end(self, run: Run) -> None:
        """Nothing has gone wrong."""
        self.ended = True

    def close(self) -> None:
        """Send the rest, and whether the run has come to an end."""
        if self.session is not None:
            self.session.finish(exit_code=0 if self.ended else 1)
            self.session = None
