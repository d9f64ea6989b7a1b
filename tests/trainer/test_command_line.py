"""The commands as a user runs them: results, and every bad input as one line and an exit code."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moebius.data.config import DataConfig
from moebius.data.manifest import Manifest
from moebius.data.shards import ShardWriter
from moebius.files import seal, unseal
from moebius.model.cost import forward_flops, planned_work, visit_costs
from moebius.model.decoder import Decoder
from moebius.trainer.config import RunConfig
from moebius.trainer.config_file import load_config
from moebius.trainer.folder import lock_folder
from tests.trainer.helpers import error_line, logged, moebius, train_run, write_config


@pytest.fixture
def config_path(run_tree: dict[str, Any], tmp_path: Path) -> Path:
    return write_config(run_tree, tmp_path / "run.yaml")


@pytest.fixture
def own_data(data_config: DataConfig, manifest: Manifest, tmp_path: Path) -> Path:
    """A copy of the prepared corpus that a test may damage."""
    return Path(shutil.copytree(data_config.dir, tmp_path / "data"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data_config: DataConfig) -> Path:
    """A run folder after `moebius train` as a subprocess, its output beside it."""
    from tests.conftest import model_tree

    folder = tmp_path_factory.mktemp("trained")
    tree = {
        "run_dir": str(folder / "run"),
        "model": model_tree(),
        "data": data_config.model_dump(),
        "train": {"num_steps": 4, "batch_size": 4, "device": "cpu"},
        "checkpoint": {"interval": 2},
        "log": {"interval": 2},
    }
    result = moebius("train", write_config(tree, folder / "run.yaml"))
    assert result.returncode == 0, result.stderr
    (folder / "output").write_text(result.stdout)
    return folder


def test_a_quiet_run_prints_nothing_and_logs_as_ever(
    run_tree: dict[str, Any], tmp_path: Path
) -> None:
    tree = run_tree | {"train": run_tree["train"] | {"num_steps": 3}}
    result = moebius("train", write_config(tree, tmp_path / "run.yaml"), "--quiet")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert len((Path(tree["run_dir"]) / "metrics.jsonl").read_text().splitlines()) >= 3


def test_train_prints_plain_lines_and_what_to_do_next(trained: Path) -> None:
    """Not a terminal: no escape codes, no carriage returns, one line per report."""
    output = (trained / "output").read_text()
    assert "\x1b" not in output
    assert "\r" not in output
    lines = output.splitlines()
    steps = [line for line in lines if re.search(r"step +\d+/4 \| loss \d", line)]
    assert len(steps) == 3
    for line in steps:
        assert re.search(r"tok/s \| MFU [\d.]+% \| ETA 0:\d\d:\d\d", line)
    assert any("validation loss" in line and "bits per byte" in line for line in lines)
    assert f"tensorboard --logdir {trained / 'run' / 'tensorboard'}" in output
    assert f"moebius generate {trained / 'run'}" in output
    assert f"resume:   moebius train {trained / 'run.yaml'}" in output


def test_evaluate_gives_the_loss_of_the_log(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").open()]
    last = [line for line in lines if "eval/loss" in line][-1]
    result = moebius("evaluate", trained / "run")
    assert result.returncode == 0, result.stderr
    assert f"validation loss {last['eval/loss']:.4f}" in result.stdout
    assert f"{last['eval/bits_per_byte']:.4f} bits per byte" in result.stdout
    assert f"selecting as in training: {last['eval/topk_loss']:.4f}" in result.stdout
    earlier = moebius("evaluate", trained / "run", "--step", "2")
    assert earlier.stdout.startswith("step 2 ")
    assert earlier.stdout != result.stdout


def test_generate_is_reproducible_and_continues_the_prompt(trained: Path) -> None:
    arguments = ("generate", trained / "run", "--prompt", "def main(", "--max-new-tokens", "12")
    first, second = moebius(*arguments), moebius(*arguments)
    other = moebius(*arguments, "--seed", "1")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("def main(")
    assert len(first.stdout) > len("def main(\n")
    assert first.stdout == second.stdout != other.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "--num-batches", "0"],
        ["evaluate", "--step", "x"],
        ["generate", "--top-k", "0"],
        ["generate", "--temperature", "-1"],
        ["generate", "--temperature", "nan"],
        ["generate", "--seed", "99999999999999999999"],
        ["generate", "--max-new-tokens", "0"],
    ],
)
def test_arguments_outside_their_range_are_named(arguments: list[str]) -> None:
    name, option, value = arguments
    result = moebius(name, "runs/none", option, value)
    assert result.returncode == 2
    assert f"argument {option}: '{value}' is not a" in result.stderr
    assert "Traceback" not in result.stderr


def test_commands_work_from_another_directory_and_on_a_plain_terminal(trained: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = moebius("generate", trained / "run", "--prompt", "é", cwd="/", env=environment)
    assert result.returncode == 0, result.stderr
    missing = moebius("evaluate", trained / "run", "--step", "3")
    assert "no checkpoint of step 3" in error_line(missing)


def test_describe_prints_the_program_with_its_totals(config_path: Path) -> None:
    result = moebius("describe", config_path)
    assert result.returncode == 0, result.stderr
    rows = [line.split("│")[1:-1] for line in result.stdout.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert [row[1:5] for row in cells] == [
        ["0", "1", "1.000", "32"],
        ["1", "1", "1.000", "32"],
        ["2", "1", "1.000", "32"],
        ["1", "2", "0.500", "16"],
        ["2", "2", "0.500", "16"],
        ["3", "1", "1.000", "32"],
    ]
    assert {row[5] for row in cells} == {"2 of 4+4"}
    assert [row[6] for row in cells].count("shared") == 2
    decoder = Decoder(load_config(config_path).model)
    work = planned_work(decoder, 1, 32)
    costs = visit_costs(decoder, work)
    flops = [f"{cost.flops / cost.extent.tokens / 1e6:,.2f}" for cost in costs]
    assert [row[7] for row in cells] == flops
    forward, ffn = forward_flops(decoder, work) / 32, sum(cost.ffn for cost in costs) / 32
    totals = f"{forward:,.0f} ({ffn:,.0f} in feed-forwards), with backward {3 * forward:,.0f}"
    assert f"forward FLOPs per token: {totals}" in result.stdout.splitlines()
    layers = sum(int(row[6].replace(",", "")) for row in cells if row[6] != "shared")
    total = int(re.search(r"parameters: ([\d,]+)", result.stdout)[1].replace(",", ""))  # type: ignore[index]
    outside_layers = 512 * 32 + 32 + 2 * 32  # embedding, final norm, depth routers
    assert total == layers + outside_layers


def test_commands_and_help() -> None:
    help_text = moebius("--help").stdout
    for command in ("train", "describe", "evaluate", "generate", "schema"):
        assert command in help_text
    assert moebius("trian").returncode == 2


def test_torchrun_starts_the_same_program(config_path: Path, run_config: RunConfig) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program = ["-m", "moebius.trainer", str(config_path)]  # a run file means train
    result = subprocess.run(
        [*command, "--nproc-per-node", "1", *program], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    by_launcher = logged(run_config.run_dir)
    shutil.rmtree(run_config.run_dir)
    train_run(run_config)
    assert by_launcher == logged(run_config.run_dir)


def test_commands_of_one_process_refuse_several(config_path: Path) -> None:
    result = moebius("describe", config_path, env=os.environ | {"WORLD_SIZE": "2"})
    assert result.returncode == 5
    assert "world size 2: moebius describe runs in one process" in error_line(result)


def test_processes_that_do_not_fill_the_axes_are_refused(config_path: Path) -> None:
    several = os.environ | {"WORLD_SIZE": "3", "RANK": "0"}
    result = moebius("train", config_path, "parallel.tp=2", env=several)
    assert result.returncode == 5
    assert "= 2 does not divide the 3 processes that were started" in error_line(result)
    result = moebius("train", config_path, "parallel.ep=2", env=several)
    assert "parallel: ep * etp = 2 does not divide the 3 processes that hold" in error_line(result)
    result = moebius("train", config_path, "parallel.ep=2", env=several | {"RANK": "1"})
    assert (result.returncode, result.stderr) == (5, "")


def test_nodes_with_other_run_files_or_corpora_are_refused(
    config_path: Path, own_data: Path
) -> None:
    """The main process and one whose options or corpus are not the same: that one says which."""
    path = own_data / "manifest.json"
    tree = unseal(path.read_bytes())
    tree["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    path.write_text(seal(tree))
    for change, said in (
        ("optim.lr=0.5", "optim.lr: 0.5, but 0.01 on the main process"),
        (f"data.dir={own_data}", "on the main process"),
    ):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        world = os.environ | {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, "-m", "moebius.trainer", "train", str(config_path)]
        main = subprocess.Popen(command, env=world | {"RANK": "0"}, stderr=subprocess.DEVNULL)
        try:
            beside = world | {"RANK": "1", "LOCAL_RANK": "0"}
            result = moebius("train", config_path, change, env=beside)
        finally:
            main.kill()
            main.wait()
        assert result.returncode == 5
        (line,) = result.stderr.splitlines()
        assert line.startswith("error (rank 1): ")
        assert said in line


# Bad input ------------------------------------------------------------------------------------


def test_unknown_key(config_path: Path) -> None:
    result = moebius("train", config_path, "optim.lrr=1")
    assert result.returncode == 2
    assert error_line(result).endswith("optim.lrr: unknown option; did you mean lr?")


def test_wrong_type(config_path: Path) -> None:
    result = moebius("train", config_path, "train.num_steps=many")
    assert result.returncode == 2
    assert error_line(result).endswith("should be a valid integer, got 'many'")


def test_impossible_shape(config_path: Path) -> None:
    result = moebius("train", config_path, "model.depth.num_layers=7")
    assert result.returncode == 2
    assert "the nearest that can: 6, 8" in error_line(result)


def test_missing_corpus(config_path: Path, tmp_path: Path) -> None:
    result = moebius(
        "train", config_path, f"data.dir={tmp_path / 'd'}", f"data.source.paths=[{tmp_path}/no.txt]"
    )
    assert result.returncode == 3
    assert f"data.source.paths: no file matches '{tmp_path}/no.txt'" in error_line(result)


def test_empty_corpus(config_path: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    result = moebius(
        "train",
        config_path,
        f"data.dir={tmp_path / 'd'}",
        f"data.source.paths=[{tmp_path}/empty.txt]",
    )
    assert result.returncode == 3
    assert "the corpus is empty" in error_line(result)


def test_vocabulary_smaller_than_the_tokenizer(config_path: Path, run_config: RunConfig) -> None:
    result = moebius("train", config_path, "model.vocab_size=300")
    assert result.returncode == 3
    assert "data.tokenizer: " in error_line(result), "the folder was made for a larger vocabulary"
    path = Path(run_config.data.dir) / "tokenizer.json"
    folder = Path(run_config.run_dir).parent / "loaded"
    overrides = (
        f"data.dir={folder}",
        f"data.tokenizer.path={path}",
        "model.vocab_size=300",
    )
    result = moebius("train", config_path, *overrides)
    assert result.returncode == 3
    assert "model.vocab_size: 300, but the tokenizer of" in error_line(result)
    assert "use model.vocab_size=512" in error_line(result)


def test_token_id_outside_the_vocabulary(config_path: Path, own_data: Path) -> None:
    """A corpus whose files are sound, but were made for another tokenizer."""
    path = own_data / "train-00000.bin"
    tokens = np.fromfile(path, dtype="<u2")
    writer = ShardWriter(own_data / "train-00000", 2**16)
    writer.write(np.full(len(tokens), 60_000))
    made = own_data / "manifest.json"
    tree = unseal(made.read_bytes())
    tree["splits"]["train"]["shards"] = [writer.close().model_dump()]
    made.write_text(seal(tree))
    result = moebius("train", config_path, f"data.dir={own_data}")
    assert result.returncode == 3
    line = error_line(result)
    assert f"'{path}' holds token id 60000" in line
    assert "allowed: 0 to 511" in line


def test_tokens_that_are_not_those_prepared(config_path: Path, own_data: Path) -> None:
    path = own_data / "train-00000.bin"
    tokens = np.fromfile(path, dtype="<u2")
    tokens[:] = 60_000
    tokens.tofile(path)
    result = moebius("train", config_path, f"data.dir={own_data}")
    assert result.returncode == 3
    line = error_line(result)
    assert f"shard file '{path}' is damaged" in line
    assert "data.bad_shards=quarantine" in line


def test_truncated_shard(config_path: Path, own_data: Path) -> None:
    path = own_data / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-10])
    result = moebius("train", config_path, f"data.dir={own_data}")
    assert result.returncode == 3
    assert f"shard file '{path}' has" in error_line(result)


def test_run_folder_of_another_config(config_path: Path, trained: Path) -> None:
    result = moebius("train", config_path, f"run_dir={trained / 'run'}")
    assert result.returncode == 4
    line = error_line(result)
    assert "belongs to another config" in line
    assert "train.num_steps: 4 -> 6" in line


def test_two_processes_in_one_run_folder(config_path: Path, run_config: RunConfig) -> None:
    with lock_folder(Path(run_config.run_dir)):
        result = moebius("train", config_path)
    assert result.returncode == 4
    assert "is being trained by another process" in error_line(result)
    assert moebius("train", config_path, "train.num_steps=3").returncode == 0


def test_damaged_checkpoint(config_path: Path, trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained / "run", tmp_path / "copy")
    newest = sorted((run / "checkpoints").iterdir())[-1]
    (newest / "model-00000.safetensors").write_bytes(b"broken")
    result = moebius("evaluate", run)
    assert result.returncode == 4
    assert "model-00000.safetensors has 6 bytes" in error_line(result)


def test_no_run_folder(tmp_path: Path) -> None:
    result = moebius("generate", tmp_path)
    assert result.returncode == 4
    assert f"'{tmp_path}' is no run folder" in error_line(result)


def test_a_model_larger_than_memory(config_path: Path) -> None:
    result = moebius("train", config_path, "model.hidden_size=4000000000")
    assert result.returncode == 1
    assert "memory" in error_line(result)


def test_unwritable_run_folder(config_path: Path) -> None:
    result = moebius("train", config_path, "run_dir=/proc/moebius")
    assert result.returncode == 1
    assert "'/proc/moebius'" in error_line(result)


def test_a_loss_that_is_not_finite_ends_the_run(config_path: Path) -> None:
    result = moebius(
        "train", config_path, "optim.lr=1e30", "optim.clip_norm=1e30", "train.num_steps=20"
    )
    assert result.returncode == 6
    errors = error_line(result)
    assert "the loss is nan" in errors
    assert "5 steps before were left out already; the run has gone back 2 times" in errors


@pytest.mark.skipif("__import__('torch').cuda.is_available()")
def test_a_device_that_is_not_there(config_path: Path) -> None:
    result = moebius("train", config_path, "train.device=cuda")
    assert result.returncode == 5
    assert "device: cuda, but torch sees no CUDA device" in error_line(result)


def test_ctrl_c_saves_exits_75_and_resumes(
    config_path: Path, run_config: RunConfig, tmp_path: Path
) -> None:
    """A real SIGINT in the middle of a run; the resumed log is that of an unbroken run."""
    overrides = ["train.num_steps=60", "checkpoint.interval=1000", "evaluation.interval=1000"]
    command = [sys.executable, "-m", "moebius.trainer", "train", str(config_path), *overrides]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if re.search(r"step +5/60", line):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 75
    stopped_at = int(re.search(r"stopped at step (\d+) of 60", rest)[1])  # type: ignore[index]
    assert 5 <= stopped_at < 60
    assert (Path(run_config.run_dir) / "checkpoints" / f"step-{stopped_at:08}").is_dir()

    resumed = moebius("train", config_path, *overrides)
    assert resumed.returncode == 0, resumed.stderr
    assert f"continuing after step {stopped_at}" in resumed.stdout
    interrupted = logged(run_config.run_dir)
    unbroken = moebius("train", config_path, *overrides, f"run_dir={tmp_path / 'unbroken'}")
    assert unbroken.returncode == 0
    assert interrupted == logged(tmp_path / "unbroken")


def test_second_ctrl_c_ends_at_once(config_path: Path, run_config: RunConfig) -> None:
    """In the middle of a step of several seconds, which the first one would let finish."""
    overrides = ["train.num_steps=9", "train.batch_size=2048", "train.micro_batch_size=64"]
    command = [sys.executable, "-m", "moebius.trainer", "train", str(config_path), *overrides]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if re.search(r"step 1/9", line):
            break
    time.sleep(0.5)  # into the second step
    process.send_signal(signal.SIGINT)
    time.sleep(0.8)  # a second one that comes at once is the same
    assert process.poll() is None, "the first one waits for the step"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "interrupted"
    assert not (Path(run_config.run_dir) / "checkpoints").exists()
