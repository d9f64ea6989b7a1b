"""Distillation, conversion, sweeps and generation, through runs and the command line."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius.data.config import DataConfig
from moebius.data.corpus import SplitReader, open_corpora
from moebius.data.stream import validation_batches
from moebius.errors import CheckpointError, ConfigError, DataError
from moebius.model.context import StepContext
from moebius.model.executor import LocalExecutor
from moebius.model.ledger import Ledger
from moebius.trainer.cli import main
from moebius.trainer.commands.generate import read_prompts
from moebius.trainer.config import RunConfig
from moebius.trainer.evaluation import evaluate
from moebius.trainer.generation import Sampler, check_causal
from moebius.trainer.restore import TrainedModel, restore
from moebius.trainer.run import Run
from moebius.trainer.sweep import Setting, best_settings, program_of, settings, sweep
from tests.conftest import model_tree
from tests.trainer.helpers import logged, saved_state, train_run, write_config

DENSE = {"kind": "dense", "intermediate_size": 48}
LOOP = {"num_layers": 6, "sharing": "middle_cycle", "num_recursions": 2}


def run_of(tree: dict[str, Any], folder: Path, name: str, **changes: Any) -> RunConfig:
    """The tests' run in a folder of its own, with another model and other fields."""
    return RunConfig.model_validate(tree | {"run_dir": str(folder / name)} | changes)


@pytest.fixture
def dense(run_tree: dict[str, Any], tmp_path: Path) -> Path:
    """The folder of a trained dense run."""
    model = model_tree(ffn=DENSE, depth={"num_layers": 6})
    return train_run(run_of(run_tree, tmp_path, "dense", model=model)).folder


def distilled(tree: dict[str, Any], folder: Path, name: str, teacher: Path) -> RunConfig:
    """A recursive student."""
    return run_of(
        tree,
        folder,
        name,
        model=model_tree(ffn=DENSE, depth=LOOP | {"router": {"warmup_steps": 5}}),
        distillation={"teacher": str(teacher), "coefficient": 0.5},
    )


def test_distillation_resumes_exactly_and_knows_its_teacher(
    run_tree: dict[str, Any], tmp_path: Path, dense: Path
) -> None:
    """Through a capacity warm-up too; other weights of the teacher are another run."""
    whole = train_run(distilled(run_tree, tmp_path, "whole", dense))
    parted = distilled(run_tree, tmp_path, "parted", dense)
    train_run(parted, stop_after=3)
    resumed = train_run(parted)
    assert logged(resumed.folder) == logged(whole.folder)
    for key, value in saved_state(whole).items():
        assert torch.equal(saved_state(resumed)[key], value), key
    assert not [name for name in saved_state(whole) if "teacher" in name]
    lines = [line for line in logged(whole.folder) if "train/loss" in line]
    assert lines[-1]["train/distillation_loss"] < lines[0]["train/distillation_loss"]

    shutil.move(dense, tmp_path / "moved")
    moved = distilled(run_tree, tmp_path, "parted", tmp_path / "moved")
    assert train_run(moved).step == 6, "where a teacher lies does not matter"
    for checkpoint in (tmp_path / "moved" / "checkpoints").glob("*6"):
        shutil.rmtree(checkpoint)
    with pytest.raises(CheckpointError, match="distilled from other weights"):
        train_run(moved)


def test_teachers_that_cannot_teach(run_tree: dict[str, Any], tmp_path: Path, dense: Path) -> None:
    corpora = open_corpora(DataConfig.model_validate(run_tree["data"]))
    with pytest.raises(CheckpointError, match=r"distillation\.teacher: .* is no run folder"):
        Run(distilled(run_tree, tmp_path, "student", tmp_path / "nothing"), corpora, [])
    model = model_tree(ffn=DENSE, depth=LOOP, vocab_size=600)
    other = run_of(run_tree, tmp_path, "other", model=model, distillation={"teacher": str(dense)})
    with pytest.raises(DataError, match="another tokenizer or vocab_size"):
        Run(other, corpora, [])


def test_a_teacher_is_the_model_of_its_checkpoint(run_tree: dict[str, Any], tmp_path: Path) -> None:
    """What is scheduled in it stays as it was; one that only looks ahead cannot teach."""
    corpora = open_corpora(DataConfig.model_validate(run_tree["data"]))
    router = {"kind": "token_choice", "full_depth_steps": 5}
    model = model_tree(ffn=DENSE, depth=LOOP | {"router": router})
    folder = train_run(run_of(run_tree, tmp_path, "scheduled", model=model)).folder
    student = Run(distilled(run_tree, tmp_path, "student", folder), corpora, [])
    assert student.teacher is not None
    own = restore(folder, None, "cpu")
    batch = next(iter(batches_of(own)))
    with torch.no_grad():
        wanted = own.executor.hidden(batch, StepContext("threshold", Ledger(), own.step))
    assert torch.equal(student.teacher.predict(batch).hidden_TD, wanted.flatten(0, 1))

    blind = model_tree(ffn=DENSE, depth=LOOP | {"router": {"causal": {"kind": "none"}}})
    other = train_run(run_of(run_tree, tmp_path, "blind", model=blind)).folder
    with pytest.raises(CheckpointError, match=r"distillation\.teacher: .*cannot generate or teach"):
        Run(distilled(run_tree, tmp_path, "pupil", other), corpora, [])


def command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, output and errors of the command line."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def test_convert_then_train_then_generate(
    run_tree: dict[str, Any], tmp_path: Path, dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = {"kind": "lora", "rank": 32}
    model = model_tree(ffn=DENSE, depth=LOOP | {"adapter": adapter})
    tree = run_tree | {"run_dir": str(tmp_path / "recursive"), "model": model}
    file = write_config(tree, tmp_path / "recursive.yaml")
    code, out, _ = command(capsys, "convert", dense, file, "--init", "average")
    assert code == 0
    assert f"moebius train {file}" in out
    converted = restore(tmp_path / "recursive", 0, "cpu")
    original = restore(dense, None, "cpu")
    assert loss_of(converted) == pytest.approx(loss_of(original), abs=1e-4), "full rank"
    assert command(capsys, "convert", dense, file)[0] == CheckpointError.exit_code
    code, _, errors = command(
        capsys, "convert", dense, file, f"run_dir={tmp_path / 'x'}", "model.depth.num_layers=10"
    )
    assert code == ConfigError.exit_code
    assert errors.startswith("error: ")
    assert "model.depth.num_layers: 10 unrolled layers, but the source has 6" in errors
    code, out, _ = command(capsys, "train", file)
    assert code == 0
    steps = [line["step"] for line in logged(tmp_path / "recursive") if "train/loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def \n\nclass \n")
    options = ("--prompts", prompts, "--max-new-tokens", "4", "--temperature", "0")
    code, together, _ = command(capsys, "generate", tmp_path / "recursive", *options)
    assert code == 0
    alone = command(capsys, "generate", tmp_path / "recursive", *options, "--slots", "1")[1]
    assert together == alone
    assert together.startswith("def ")
    assert "\nclass " in together
    assert command(capsys, "generate", tmp_path / "recursive", *options, "--exit", "3")[0] == 0
    code, _, errors = command(capsys, "generate", tmp_path / "recursive", "--exit", "9")
    assert (code, "--exit: 9; allowed: 1, 2, 3" in errors) == (ConfigError.exit_code, True)
    prompts.write_bytes("\ufeffa\u2028b\r\n\nc".encode())
    assert read_prompts(prompts) == ["a\u2028b", "c"]
    prompts.write_bytes(b"\xff")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read_prompts(prompts)
    prompts.write_text("\n")
    code, _, errors = command(capsys, "generate", tmp_path / "recursive", *options)
    assert (code, "holds no line" in errors) == (DataError.exit_code, True)


def batches_of(model: TrainedModel) -> Any:
    config = model.config.data
    reader = SplitReader(model.corpora.first, "validation", config.sequence_length)
    return validation_batches(reader, 4, 2)


def loss_of(model: TrainedModel, executor: LocalExecutor | None = None) -> float:
    metrics = evaluate(
        executor or model.executor,
        batches_of(model),
        model.token_bytes_V,
        model.device,
        model.step,
        0,
    )
    return metrics["eval/loss"]


def test_sweep_is_the_evaluation_of_each_setting(
    run_tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_config = model_tree(depth=LOOP | {"router": {}})
    folder = train_run(run_of(run_tree, tmp_path, "routed", model=model_config)).folder
    model = restore(folder, None, "cpu")
    chosen = list(settings(model.config.model, None, [0.5, 1.0]))
    assert [str(setting) for setting in chosen][:3] == [
        "1 pass",
        "1 pass, shares x0.5",
        "1 pass, shares x1",
    ]
    step = StepContext("threshold", Ledger(), model.step, 0)
    outcomes = sweep(model.executor, batches_of(model), chosen, model.device, step)
    bound, wins = best_settings(outcomes)
    assert int(wins.sum()) == len(outcomes[0].sample_losses_R) == 8
    assert bound <= min(outcome.loss for outcome in outcomes)
    losses = {str(outcome.setting): outcome for outcome in outcomes}
    assert losses["2 passes"].loss == pytest.approx(loss_of(model), abs=1e-9)
    shallow = program_of(model.config.model.depth, Setting(1, "threshold", 1.0), model.step)
    assert [visit.layer for visit in shallow.visits] == ["0", "1", "2", "3"]
    executor = LocalExecutor(model.executor.decoder, program=shallow)
    assert losses["1 pass"].loss == pytest.approx(loss_of(model, executor), abs=1e-9)
    flops = [
        losses[f"{n}, shares x{x}"].flops_per_token
        for n, x in (("1 pass", "0.5"), ("1 pass", "1"), ("2 passes", "1"))
    ]
    assert flops == sorted(set(flops))
    code, out, _ = command(capsys, "sweep", folder, "--recursions", "2", "--scales", "0.5")
    assert code == 0
    assert "with the best setting for each sample" in out
    code, _, errors = command(capsys, "sweep", folder, "--recursions", "3")
    assert (code, "use numbers up to 2" in errors) == (ConfigError.exit_code, True)


def test_plain_recursion_can_go_deeper_than_it_was_trained(
    run_tree: dict[str, Any], tmp_path: Path, dense: Path
) -> None:
    model = RunConfig.model_validate(run_tree | {"model": model_tree(ffn=DENSE, depth=LOOP)}).model
    assert [setting.recursions for setting in settings(model, [1, 5], [1.0])] == [1, 5]
    mixture = {
        "kind": "mixture",
        "num_experts": 4,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 8,
    }
    routed = model_tree(ffn=DENSE, depth=LOOP, attention=mixture)
    config = RunConfig.model_validate(run_tree | {"model": routed})
    with pytest.raises(ConfigError, match="use numbers up to 2"):
        list(settings(config.model, [3], [1.0]))
    program = program_of(model.depth, Setting(5, "threshold", 1.0), 0)
    assert len(program.visits) == 12
    with pytest.raises(ConfigError, match="no depth to sweep"):
        list(settings(restore(dense, None, "cpu").config.model, None, [1.0]))


@pytest.mark.parametrize(
    ("causal", "can"),
    [
        ({"kind": "loss"}, True),
        ({"kind": "router"}, True),
        ({"kind": "none"}, False),
        ({"coefficient": 0.0}, False),
    ],
)
def test_only_causal_models_generate(
    run_tree: dict[str, Any], causal: dict[str, Any], can: bool
) -> None:
    model = model_tree(depth=LOOP | {"router": {"causal": causal}})
    config = RunConfig.model_validate(run_tree | {"model": model})
    if can:
        check_causal(config.model)
    else:
        with pytest.raises(ConfigError, match="cannot generate or teach"):
            check_causal(config.model)


def test_the_sampler_draws_from_the_softmax_of_the_best() -> None:
    logits_V = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5])
    assert Sampler(0.0, 50, 0)(logits_V, 0, 0) == 1
    assert {Sampler(1.0, 1, 0)(logits_V, 0, n) for n in range(20)} == {1}
    sampler = Sampler(0.7, 3, 1)
    drawn = torch.tensor([sampler(logits_V, prompt, n) for prompt in range(4) for n in range(1000)])
    share_V = torch.bincount(drawn, minlength=5) / len(drawn)
    wanted = torch.tensor([-torch.inf, 2.0, 1.0, -torch.inf, 1.5])
    torch.testing.assert_close(share_V, (wanted / 0.7).softmax(0), rtol=0, atol=0.03)
    assert sampler(logits_V, 2, 7) == int(drawn[2007])
