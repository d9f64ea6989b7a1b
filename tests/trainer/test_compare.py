"""moebius compare: real runs, disturbed on purpose, and where the command says that they part."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moebius.errors import CheckpointError
from moebius.model.parameters import Role, named_specs
from moebius.parallel.part import Box
from moebius.trainer.callbacks.base import Callback, StepReport
from moebius.trainer.callbacks.trace import Signs, forward_order
from moebius.trainer.cli import main
from moebius.trainer.comparison import compare, layer_of, read_course, relative
from moebius.trainer.run import Run
from tests.conftest import model_tree
from tests.parallel.test_training import DEEPSPEED, LAYOUTS, train_on
from tests.trainer.helpers import logged, saved_state, train_run
from tests.trainer.test_resume import config_in

DENSE = {"kind": "dense", "intermediate_size": 48}
WEIGHT = "layers.1.ffn.experts.groups.0.down"
MODEL = model_tree(ffn=DENSE, depth={"num_layers": 4})
"""layers that are used once: a fault in one of them shows in this one first"""


class Disturb(Callback):
    """Adds a little to one weight after one step, before anything looks at it."""

    name = "disturb"

    def __init__(self, step: int, parameter: str, amount: float = 1e-3) -> None:
        self.step = step
        self.parameter = parameter
        self.amount = amount

    def on_step_end(self, run: Run, report: StepReport) -> None:
        if run.step == self.step:
            with torch.no_grad():
                run.decoder.get_parameter(self.parameter).view(-1)[0] += self.amount


class DisturbBackward(Callback):
    """Makes the gradient that leaves one layer a little larger in one step."""

    name = "disturb_backward"

    def __init__(self, step: int, layer: str) -> None:
        self.step = step
        self.layer = layer

    def on_start(self, run: Run) -> None:
        def scale(gradient: Tensor) -> Tensor:
            return gradient * 1.01 if run.step + 1 == self.step else gradient

        def hook(module: Any, inputs: Any, output: Any) -> None:
            if output[0].requires_grad:
                output[0].register_hook(scale)

        run.decoder.layers[self.layer].register_forward_hook(hook)


@pytest.fixture
def traced(run_tree: dict[str, Any]) -> dict[str, Any]:
    return run_tree | {"log": {"interval": 1, "trace": True}}


@pytest.fixture
def dense(traced: dict[str, Any]) -> dict[str, Any]:
    return traced | {"model": MODEL}


def compared(
    capsys: pytest.CaptureFixture[str], *words: str | Path, code: int = 1
) -> dict[str, Any]:
    """What the command says as JSON."""
    capsys.readouterr()
    assert main(["compare", *map(str, words), "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def printed(capsys: pytest.CaptureFixture[str], *words: str | Path, code: int = 1) -> str:
    capsys.readouterr()
    assert main(["compare", *map(str, words)]) == code
    return capsys.readouterr().out


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]


def test_equal_runs_are_alike_bit_for_bit_with_another_interval(
    traced: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is reported how often changes nothing, nor does who evaluates when."""
    for name, interval in (("a", 1), ("b", 3)):
        log = {"interval": interval, "trace": True}
        train_run(config_in(traced, tmp_path / name, log=log))
    found = compared(capsys, tmp_path / "a", tmp_path / "b", "--rtol", "0", code=0)
    assert (found["step"], found["steps"], found["traced"]) == (None, 7, [7, 7])
    assert found["missing"] == [[], []]
    text = printed(capsys, tmp_path / "a", tmp_path / "b", code=0)
    assert "7 steps in both" in text
    assert "no difference" in text
    assert "log.trace" not in text


def test_a_weight_that_changed_at_one_step_is_named(
    traced: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One element of one expert of one layer: the step, the layer and nothing before it."""
    train_run(config_in(traced, tmp_path / "a"))
    train_run(config_in(traced, tmp_path / "b"), beside=[Disturb(4, WEIGHT)])
    found = compared(capsys, tmp_path / "a", tmp_path / "b")
    assert found["step"] == 4
    assert (found["metrics"], found["gradients"]) == ([], [])
    assert [weight["name"] for weight in found["weights"]] == [WEIGHT]
    assert found["weights"][0]["kind"] == "projection", "a norm hardly sees it"
    assert (found["origin"]["layer"], found["origin"]["edge"]) == ("layer 1", "first")
    assert found["largest"][0] >= 4
    assert not found["evaluation_only"]
    text = printed(capsys, tmp_path / "a", tmp_path / "b")
    assert "the first difference is at step 4" in text
    assert f"first in layer 1: {WEIGHT}" in text
    assert "layers.0." not in text
    assert "step 4" in printed(capsys, tmp_path / "b", tmp_path / "a", "--rtol", "0")


def test_a_backward_pass_that_went_wrong_is_told_from_the_rest(
    dense: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It runs from the head: layers behind the fault have their gradients, but clipping and so all
    weights come out differently."""
    train_run(config_in(dense, tmp_path / "a"))
    train_run(config_in(dense, tmp_path / "b"), beside=[DisturbBackward(3, "2")])
    found = compared(capsys, tmp_path / "a", tmp_path / "b")
    assert found["step"] == 3
    training = [d["name"] for d in found["metrics"] if not d["name"].startswith("eval/")]
    assert training == ["train/grad_norm", "train/param_norm"]
    layers = {layer_of(d["name"]) for d in found["gradients"]}
    assert layers == {"embedding", "layer 0", "layer 1", "layer 2"}
    assert (found["origin"]["layer"], found["origin"]["edge"]) == ("layer 2", "last")
    assert "last in layer 2" in printed(capsys, tmp_path / "a", tmp_path / "b")


def test_other_samples_and_other_initial_weights(
    dense: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights alike after a step, and another loss at the next one; a seed changes step 0."""
    train_run(config_in(dense, tmp_path / "a"))
    seed = {"train": dense["train"] | {"seed": 1}}
    train_run(config_in(dense, tmp_path / "seed", **seed))
    found = compared(capsys, tmp_path / "a", tmp_path / "seed")
    assert (found["step"], found["origin"]["layer"]) == (0, "embedding")
    assert found["origin"]["reason"] == "the initial weights differ"

    config = config_in(dense, tmp_path / "b")
    run = train_run(config, stop_after=3)
    assert run.step == 3
    skipped = {"train": dense["train"] | {"batch_size": 8}}  # from here on, twice as many samples
    train_run(config_in(dense, tmp_path / "b", **skipped))
    found = compared(capsys, tmp_path / "a", tmp_path / "b")
    assert found["step"] == 4
    assert "train/loss" in {metric["name"] for metric in found["metrics"]}
    assert found["origin"]["reason"].startswith("losses differ")


def test_runs_without_a_trace_and_single_files(
    run_tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Metrics tell the step; the command says what would tell the layer."""
    train_run(config_in(run_tree, tmp_path / "a"))
    train_run(config_in(run_tree, tmp_path / "b"), beside=[Disturb(4, WEIGHT, amount=0.1)])
    logs = [tmp_path / name / "metrics.jsonl" for name in ("a", "b")]
    for pair in ((tmp_path / "a", tmp_path / "b"), logs):
        found = compared(capsys, *pair)
        assert (found["step"], found["origin"], found["traced"]) == (4, None, [0, 0])
        assert [metric["name"] for metric in found["metrics"]] == ["train/param_norm"]
        assert found["largest"][0] > 4
    text = printed(capsys, tmp_path / "a", tmp_path / "b")
    assert "the first difference is at step 4" in text
    assert "the largest difference is at step " in text
    assert "log.trace=true names layers" in text
    assert not (tmp_path / "a" / "trace.jsonl").exists()


def test_evaluations_alone_are_said_to_be_so(
    traced: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other held-out batches; a metric of one run is listed, and is no difference."""
    train_run(config_in(traced, tmp_path / "a"))
    train_run(config_in(traced, tmp_path / "b", evaluation={"interval": 3, "num_batches": 1}))
    found = compared(capsys, tmp_path / "a", tmp_path / "b")
    assert (found["step"], found["evaluation_only"]) == (0, True)
    assert "only evaluations differ" in printed(capsys, tmp_path / "a", tmp_path / "b")
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/new": 1.0, "speed/new": 1.0}\n')
    found = compared(capsys, tmp_path / "a", tmp_path / "b")
    assert found["missing"] == [[], ["train/new"]]
    assert f"only in {tmp_path / 'b'}: train/new" in printed(capsys, tmp_path / "a", tmp_path / "b")


def test_a_trace_has_the_norms_of_whole_tensors(traced: dict[str, Any], tmp_path: Path) -> None:
    """Weights against those that the run ended with, gradients against the norm that is clipped."""
    run = train_run(config_in(traced, tmp_path / "a"))
    lines = lines_of(tmp_path / "a")
    assert [line["step"] for line in lines] == list(range(7))
    assert "gradients" not in lines[0]
    names = list(lines[0]["weights"])
    assert names == forward_order(run.decoder)
    assert names[0].startswith("embedding"), names
    assert names[-1] == "norm.weight"
    assert (
        names.index("depth_routers.0.scorers.0.weight")
        == names.index("layers.1.attention_norm.weight") - 2
    ), "of two scorers, before the loop that they route"
    state = {k.removeprefix("model/"): v for k, v in saved_state(run).items() if k[:6] == "model/"}
    assert state.keys() == lines[-1]["weights"].keys()
    for name, (norm, projection) in lines[-1]["weights"].items():
        assert norm == pytest.approx(float(state[name].double().norm()), rel=1e-12)
        assert abs(projection) <= float(state[name].double().abs().sum()) * (1 + 1e-12)
    auxiliary = {n for n, _, spec in named_specs(run.decoder) if spec.role is Role.AUX_ROUTER}
    reported = {line["step"]: line for line in logged(tmp_path / "a") if "train/loss" in line}
    for line in lines[1:]:
        squares = [v * v for n, v in line["gradients"].items() if n not in auxiliary]
        assert math.sqrt(sum(squares)) == pytest.approx(line["train/grad_norm"], rel=1e-6)
        for name in ("train/loss", "train/grad_norm"):
            assert line[name] == reported[line["step"]][name]


def test_a_projection_sees_every_element_and_its_place() -> None:
    """Boxes add up to the whole, whatever they are; an element, a swap of rows, a transposition."""
    signs, generator = Signs(), torch.Generator().manual_seed(0)
    whole = torch.randn(6, 6, 4, dtype=torch.float64, generator=generator)

    def of(value: Tensor) -> float:
        return float(signs.project(value, box((0, 0, 0), value), (6, 6, 4)))

    def box(offsets: tuple[int, ...], value: Tensor) -> Any:
        return Box(offsets, tuple(value.shape))

    parts = [((0, 0, 0), whole[:2]), ((2, 0, 0), whole[2:, :5]), ((2, 5, 0), whole[2:, 5:])]
    total = sum(float(signs.project(value, box(at, value), (6, 6, 4))) for at, value in parts)
    assert total == pytest.approx(of(whole), rel=1e-12)
    changed = whole.clone()
    changed[3, 2, 1] += 1e-9
    assert abs(of(changed) - of(whole)) == pytest.approx(1e-9, rel=1e-4)
    assert of(whole.transpose(0, 1)) != pytest.approx(of(whole))
    assert of(whole.flip(0)) != pytest.approx(of(whole))


def test_a_resumed_run_has_each_step_once(
    traced: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped, and killed after steps that no checkpoint has: exactly the unbroken run."""
    train_run(config_in(traced, tmp_path / "whole"))
    config = config_in(traced, tmp_path / "resumed")
    train_run(config, stop_after=4)
    path = tmp_path / "resumed" / "trace.jsonl"
    lost = path.read_text().splitlines()[-1].replace('"step": 4', '"step": 5')
    path.write_text(path.read_text() + lost + "\n" + lost[:100])
    train_run(config)
    assert [line["step"] for line in lines_of(tmp_path / "resumed")] == list(range(7))
    assert path.read_text() == (tmp_path / "whole" / "trace.jsonl").read_text()
    compared(capsys, tmp_path / "whole", tmp_path / "resumed", "--rtol", "0", code=0)


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_several_processes_trace_what_one_does(
    traced: dict[str, Any], tmp_path: Path, layout: str
) -> None:
    """Whatever of a tensor is where, and however often: the numbers are those of whole ones."""
    for name in ("one", layout):
        assert train_on(traced, tmp_path / name, name) == 6
    one, several = read_course(tmp_path / "one"), read_course(tmp_path / layout)
    assert one.traced.keys() == several.traced.keys() == set(range(7))
    assert several.tensors(6)[0].keys() == one.tensors(6)[0].keys() != set(), "gradients"
    assert compare(one, several, 1e-3).step is None
    initial = [replace(course, metrics={0: {}}) for course in (one, several)]
    assert compare(*initial, 1e-12).step is None, "only sums are rounded differently"


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("layout", DEEPSPEED)
def test_deepspeed_traces_weights(traced: dict[str, Any], tmp_path: Path, layout: str) -> None:
    """Its gradients are not to be had; nothing is said of them."""
    pytest.importorskip("deepspeed")
    for name in ("one", layout):
        assert train_on(traced, tmp_path / name, name) == 6
    one, several = read_course(tmp_path / "one"), read_course(tmp_path / layout)
    assert several.tensors(6)[0] == {}
    found = compare(one, several, 1e-3)
    assert (found.step, found.traced) == (None, (7, 7))


def test_numbers_that_are_not_finite() -> None:
    assert relative(math.nan, math.nan) == 0
    assert relative(math.nan, 1.0) == math.inf
    assert relative(math.inf, math.inf) == 0
    assert relative(0.0, 0.0) == 0
    assert relative(0.0, 1e-30) == 1
    assert relative(1.0, 1.1, scale=0.0) == math.inf


def test_what_cannot_be_compared_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, text in {
        "a": '{"step": 1, "train/loss": 2.0}\n',
        "b": '{"step": 2, "train/loss": 2.0}\n',
        "damaged": '{"step": 1, "train/loss": 2.0}\n{"step"\n{"step": 3, "train/loss": 2.0}\n',
        "none": "",
        "words": '{"step": 1, "train/loss": "two"}\n{"step": 2}\n',
        "shape": '{"step": 1, "train/loss": 2.0, "weights": {"norm.weight": 1}}\n',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)

    def refused(*words: str) -> str:
        with pytest.raises(CheckpointError) as caught:
            compare(*(read_course(tmp_path / word) for word in words), 1e-6)
        return str(caught.value)

    assert "does not exist" in refused("nowhere", "a")
    assert "has no metrics.jsonl" in refused("a", "empty")
    assert "no step in common" in refused("a", "b")
    assert "line 2 is damaged" in refused("a", "damaged")
    assert "line 1 is damaged" in refused("a", "words")
    assert "has no step yet" in refused("a", "none")
    assert "the line of step 1 is damaged" in refused("shape", "shape")


def test_errors_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(words) == CheckpointError.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: '{tmp_path / 'a'}' does not exist")
    for value in ("-1", "nan", "much"):
        with pytest.raises(SystemExit) as caught:
            main([*words, f"--rtol={value}"])
        assert caught.value.code == 2
        assert f"--rtol: '{value}' is not a number >= 0" in capsys.readouterr().err
