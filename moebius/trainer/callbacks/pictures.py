"""What can be seen of the routing of a step, for those who show it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moebius.files import write_whole
from moebius.trainer.callbacks.base import Callback, StepReport
from moebius.trainer.metrics import fetched
from moebius.trainer.pictures import pictures
from moebius.trainer.trails import ROWS, markdown, means_by_class, page, trails

if TYPE_CHECKING:
    from moebius.trainer.run import Run

FOLDER = "tokens"


class PicturesCallback(Callback):
    """Gives heat maps of a step, and its first rows with tokens coloured by what they got, to every
    callback that shows them, each `log.picture_interval`; the rows as pages in `<run_dir>/tokens`,
    too.
    """

    name = "pictures"
    priority = 20

    def on_step_end(self, run: Run, report: StepReport) -> None:
        """Draw where it is due."""
        if not run.draws:
            return
        for name, image_HWC in pictures(fetched(report.ledger)).items():
            run.show(name, image_HWC)
        self._show_tokens(run, report)

    def _show_tokens(self, run: Run, report: StepReport) -> None:
        tokens_BS = torch.cat([batch.tokens_BS for batch in report.read])[:ROWS]
        found = trails(run.blueprint, report.ledger, len(tokens_BS))
        if not found:
            return
        ids = [[token] for token in tokens_BS.flatten().tolist()]
        texts = run.tokenizer.decode_batch(ids, skip_special_tokens=False)
        for trail in found:
            run.show_text(f"tokens/{trail.name}", markdown(trail, texts))
            of_classes = means_by_class(trail, texts)
            run.publish({f"tokens/{trail.name}_of_{k}": mean for k, mean in of_classes.items()})
        title = f"step {run.step}, samples from {report.sample_ids.start}"
        path = run.folder / FOLDER / f"step-{run.step:08}.html"
        try:
            path.parent.mkdir(exist_ok=True)
            write_whole(path, page(title, found, texts))
        except OSError as error:  # a page is not worth the run
            run.tell("not written", f"{path}: {error.strerror}")
