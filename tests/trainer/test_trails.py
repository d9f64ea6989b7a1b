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
from tests.faults.test_torchrun import launch
from tests.trainer.helpers import train_run, write_config


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
        rows = spans(section)
        assert [html.unescape("".join(text for _, text in row)) for row in rows] == keep.text
        assert sum(int(count) for row in rows for count, _ in row) == total > 0

    tensorboard = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    (text,) = tensorboard.Tensors("tokens/passes/text_summary")[-1].tensor_proto.string_val
    assert len(re.findall("[⬜🟦🟩]`", text.decode())) == run.config.data.sequence_length


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "num_rows"),
    [({}, 2), ({"pp": 2}, 4), ({"rp": 2}, 4), ({"cp": 2}, 4), ({"tp": 2}, 4), ({"ep": 2}, 2)],
    ids=str,
)
def test_rows_on_two_processes(
    run_tree: dict[str, Any], tmp_path: Path, layout: dict[str, int], num_rows: int
) -> None:
    """The first process shows the rows that it has read, and these went the same ways as in one."""
    tree = run_tree | {"log": {"picture_interval": 1}}
    folder = train_run(RunConfig.model_validate(tree)).folder
    other = tree | {"run_dir": str(tmp_path / "two"), "parallel": layout}
    launcher = launch(write_config(other, tmp_path / "two.yaml"), 2)
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, errors
    pages = (path / "tokens" / "step-00000001.html" for path in (folder, tmp_path / "two"))
    one, two = map(sections, pages)
    assert len(one) == len(two) == 2
    for expected, found in zip(one, two, strict=True):
        assert spans(found) == spans(expected)[:num_rows]


def test_a_page_that_cannot_be_written_is_an_event(run_tree: dict[str, Any]) -> None:
    config = RunConfig.model_validate(run_tree)
    Path(config.run_dir).mkdir()
    (Path(config.run_dir) / "tokens").write_text("in the way")
    folder = train_run(config).folder
    (line,) = (folder / "events.jsonl").read_text().splitlines()
    assert "not written" in line
    assert "step-00000006.html" in line


def sections(path: Path) -> list[str]:
    """Of a page, what each of the counts has."""
    return path.read_text().split("<h2>")[1:]


def spans(section: str) -> list[list[tuple[str, str]]]:
    """By row, the count and the text of each token."""
    rows = re.findall(r"<p>(.*?)</p>", section, re.S)
    return [re.findall(r'title="(\d+)">(.*?)</span>', row, re.S) for row in rows]


def test_classes_and_their_means() -> None:
    texts = ["def", " the", "re", "42", "\n  ", "(", "x", " Ünder", " x1"]
    classes = ["word", "word", "part", "digits", "space", "other", "word", "word", "digits"]
    assert [class_of(*pair) for pair in zip(texts, ["", *texts], strict=False)] == classes
    rows = ["def", " the", "re", "x", "y", "1"]
    means = means_by_class(Trail("passes", "", torch.tensor([[1, 2, 3], [4, 6, 8]])), rows)
    assert means == pytest.approx({"word": (1 + 2 + 4) / 3, "part": (3 + 6) / 2, "digits": 8})


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
