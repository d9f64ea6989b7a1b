"""Where tokens went, against the counts of the same step."""

import html
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moebius.trainer.callbacks.base import Callback, StepReport
from moebius.trainer.config import RunConfig
from moebius.trainer.run import Run
from moebius.trainer.trails import Trail, class_of, markdown, means_by_class, page
from tests.trainer.helpers import train_run


class Keep(Callback):
    """Keeps what the last step has left behind."""

    def on_step_end(self, run: Run, report: StepReport) -> None:
        """Each replaces the one before."""
        self.report, self.text = (
            report,
            run.tokenizer.decode_batch(
                torch.cat([batch.tokens_BS for batch in report.read]).tolist(), False
            ),
        )


def test_rows_of_a_run(run_tree: dict[str, Any]) -> None:
    """All four rows of a step are shown: their tokens spell the text, and what these got adds up to
    what the routers have counted."""
    keep = Keep()
    config = RunConfig.model_validate(run_tree | {"log": {"picture_interval": 4}})
    run = train_run(config, beside=[keep])
    sums = keep.report.ledger.statistics
    selected = sum(int(s["selected"]) for site, s in sums.items() if "places" in s)
    computing = {site: s["executed_tokens"] for site, s in sums.items() if "executed_tokens" in s}
    num_computing = run.config.model.ffn.pool.num_computing  # type: ignore[union-attr]
    executed = sum(int(counts[:num_computing].sum()) for counts in computing.values())

    pages = sorted((run.folder / "tokens").iterdir())
    assert [path.name for path in pages] == ["step-00000004.html", "step-00000006.html"]
    experts, passes = sections(pages[-1])
    for section, total in ((experts, executed), (passes, selected)):
        rows = re.findall(r"<p>(.*?)</p>", section, re.S)
        spans = [re.findall(r'title="(\d+)">(.*?)</span>', row, re.S) for row in rows]
        assert [html.unescape("".join(t for _, t in row)) for row in spans] == keep.text
        assert sum(int(count) for row in spans for count, _ in row) == total > 0

    tensorboard = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    (text,) = tensorboard.Tensors("tokens/passes/text_summary")[-1].tensor_proto.string_val
    assert len(re.findall("[⬜🟦🟩]`", text.decode())) == run.config.data.sequence_length


def sections(path: Path) -> list[str]:
    """Of a page, what each of the counts has."""
    return path.read_text().split("<h2>")[1:]


def test_classes_and_their_means() -> None:
    texts = [" the", "re", "42", "\n  ", ",", " Ünder", " x1"]
    classes = ["word", "part", "digits", "space", "other", "word", "digits"]
    assert [class_of(text) for text in texts] == classes
    counts = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]])
    means = means_by_class(Trail("passes", "", counts), [*texts, ""])
    assert means == pytest.approx({"word": 3.5, "part": 2, "digits": 5, "space": 2, "other": 5})


def test_squares_share_a_colour_where_counts_are_many() -> None:
    few = markdown(Trail("passes", "passes", torch.tensor([[0, 2, 1]])), ["a", " b", "`\n|"])
    assert few == "passes: ⬜ 0 · 🟦 1 · 🟩 2\n\n⬜`a` 🟩`␣b` 🟦`ˋ⏎¦`"
    many = markdown(Trail("experts", "experts", torch.tensor([[0, 11]])), ["a", "b"])
    legend = "⬜ 0 to 1 · 🟦 2 to 3 · 🟩 4 to 5 · 🟨 6 to 7 · 🟧 8 to 9 · 🟥 10 to 11"
    assert many == f"experts: {legend}\n\n⬜`a` 🟥`b`"


def test_text_cannot_become_markup() -> None:
    trail = Trail("passes", "passes", torch.tensor([[1]]))
    made = page("<t>", [trail], ["<script>"])
    assert "<script>" not in made
    assert "&lt;script&gt;" in made
    assert "<t>" not in made.replace("<title>", "")
