"""Published numbers and their documentation, read back from TensorBoard's files."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from moebius.trainer.config import RunConfig
from moebius.trainer.pictures import CELL, COLD, EVEN, HOT, NONE, heat_map
from moebius.trainer.tags import (
    BOTH_KINDS,
    DEPTH,
    EVALUATION,
    EXPERT_CHOICE,
    FINAL,
    LAYOUT,
    MOE,
    PICTURES,
    SINGLE,
    TAGS,
    TEXTS,
    documented,
    page,
)
from tests.trainer.helpers import REPOSITORY, train_run

HERE = {"", MOE, BOTH_KINDS, DEPTH, EXPERT_CHOICE, EVALUATION, SINGLE}
"""what is true of the run of `run_tree`"""


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={IMAGES: 0}).Reload()


def test_the_page_is_that_of_the_code() -> None:
    written = (REPOSITORY / "docs/metrics.md").read_text()
    assert written == page(), "python -m moebius.trainer.tags > docs/metrics.md"


def test_every_tag_of_a_run_is_documented_and_the_other_way_round(run_tree: dict[str, Any]) -> None:
    run = train_run(RunConfig.model_validate(run_tree | {"log": {"picture_interval": 4}}))
    found = events(run.folder)
    names = found.Tags()["scalars"]
    assert {name for name in names if documented(name) is None} == set()
    expected = [tag for tag in TAGS if tag.when in HERE]
    assert {tag.name for tag in expected if not any(map(tag.matches, names))} == set()
    assert {documented(name) for name in names} <= set(expected)
    assert "custom_scalars__config__" in found.Tags()["tensors"]
    images = set(found.Tags()["images"])
    assert images == {tag.name for tag in PICTURES if tag.name != "width/experts_per_token"}
    assert [image.step for image in found.Images("width/load")] == [4, 6]
    texts = {name.removesuffix("/text_summary") for name in found.Tags()["tensors"]}
    assert texts - {"custom_scalars__config__"} == {tag.name for tag in TEXTS}


def test_options_and_final_metrics_are_read_back(run_tree: dict[str, Any]) -> None:
    """As TensorBoard's page of hyperparameters reads them; the session ends with the last step."""
    tree = run_tree | {"checkpoint": {"interval": 2}}
    found = {}
    for stop_after in (2, None):
        folder = train_run(RunConfig.model_validate(tree), stop_after=stop_after).folder
        read = events(folder).SummaryMetadata
        contents = events(folder).PluginTagToContent("hparams")
        found[stop_after] = {
            tag.removeprefix("_hparams_/"): HParamsPluginData.FromString(content)
            for tag, content in contents.items()
        }
        assert read("_hparams_/session_start_info").plugin_data.plugin_name == "hparams"
    assert set(found[2]) == {"experiment", "session_start_info"}
    assert set(found[None]) == {*found[2], "session_end_info"}
    options = found[None]["session_start_info"].session_start_info.hparams
    assert options["train.batch_size"].number_value == 4
    assert options["train.device"].string_value == "cpu"
    assert "optim.weight_decay" not in options, "left as it is"
    metrics = found[None]["experiment"].experiment.metric_infos
    assert [metric.name.tag for metric in metrics] == list(FINAL)
    assert set(FINAL) <= set(events(folder).Tags()["scalars"])


def test_charts_show_what_there_is() -> None:
    shown = [name for charts in LAYOUT.values() for _, names in charts.values() for name in names]
    plain = [tag.name.replace("<", "").replace(">", "") for tag in TAGS]
    for name in shown:
        assert any(re.fullmatch(name, known) or documented(name) for known in plain), name


def test_names_differ() -> None:
    """No name could be that of two tags."""
    for tag in TAGS:
        assert documented(tag.name.replace("<", "").replace(">", "")) == tag


def test_cells_have_the_colours_of_their_numbers() -> None:
    """0, 1, 2 and more; a shorter row ends in cells that there are not."""
    image = heat_map([torch.tensor([0.0, 1.0, 5.0]), torch.tensor([2.0])])
    assert image.shape == (2 * CELL, 3 * CELL, 3)
    centres = image[CELL // 2 :: CELL, CELL // 2 :: CELL].float() / 255
    expected = torch.tensor([[COLD, EVEN, HOT], [HOT, NONE, NONE]])
    assert centres.flatten().tolist() == pytest.approx(expected.flatten().tolist(), abs=0.01)
