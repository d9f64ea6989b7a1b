"""moebius submit without a SLURM: the script, what it is made from, and what is refused."""

import argparse
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from moebius.trainer.cli import main
from moebius.trainer.cluster.client import reason
from moebius.trainer.cluster.config import load_cluster
from moebius.trainer.cluster.script import Job, render
from moebius.trainer.cluster.submission import (
    SECRET,
    VARIABLES,
    jobs_of,
    next_folder,
    note_jobs,
    write,
)
from moebius.trainer.commands.submit import add_arguments, members
from moebius.trainer.config import RunConfig
from moebius.trainer.config_file import load_config
from tests.trainer.helpers import REPOSITORY, write_config

PRESETS = sorted((REPOSITORY / "slurm").glob("*.yaml"))
HERE = Path("/runs/one")


@pytest.fixture
def config_path(run_tree: dict[str, Any], tmp_path: Path) -> Path:
    return write_config(run_tree, tmp_path / "run.yaml")


def options_of(script: str) -> list[str]:
    return re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE)


def settings_of(script: str) -> dict[str, str]:
    """What the first lines of a script set, by bash itself."""
    lines = script.partition("# ------")[0].splitlines()
    head = "\n".join(line for line in lines if re.match(r"(export )?\w+=", line))
    names = re.findall(r"^(?:export )?(\w+)=", head, re.MULTILINE)
    command = head + "".join(f'\necho "{name}=${{{name}[*]}}"' for name in names)
    environment = {"SLURM_ARRAY_TASK_ID": "7", "PATH": os.environ["PATH"]}
    result = subprocess.run(
        ["bash", "-euc", command], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    return dict(line.split("=", 1) for line in result.stdout.splitlines())


def assert_valid(script: str) -> None:
    result = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, ""), script


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_presets_make_scripts(path: Path) -> None:
    cluster = load_cluster(path, {})
    script = render(Job(HERE, HERE / "submissions" / "1"), cluster)
    assert_valid(script)
    assert f"--nodes={cluster.nodes}" in options_of(script)
    assert f"--time={cluster.time}" in options_of(script)
    assert settings_of(script)["processes"].split()[0] == str(cluster.processes)


def test_flags_go_over_the_file(
    config_path: Path, run_tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    file = REPOSITORY / "slurm" / "gpu-8.yaml"
    words = ["submit", config_path, "train.batch_size=16", "train.micro_batch_size=2"]
    words += ["--cluster", file, "--nodes", "2", "--time", "2-12:00:00", "--lead", "120"]
    words += ["--partition", "h100", "--account", "a1", "--qos", "low", "--job-name", "first"]
    words += ["--setup", "module load cuda", "--setup", "ulimit -n 9000", "--print"]
    words += ["--preflight-option=--wait=300", "--preflight-option=--save=900"]
    assert main([str(word) for word in words]) == 0
    script = capsys.readouterr().out
    assert_valid(script)
    run = run_tree["run_dir"]
    assert options_of(script) == [
        "--job-name=first",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=8",
        "--cpus-per-task=96",
        "--time=2-12:00:00",
        "--partition=h100",
        "--account=a1",
        "--qos=low",
        f"--chdir={Path.cwd()}",
        f"--output={run}/slurm-%j.log",
        "--open-mode=append",
        "--requeue",
        "--signal=B:USR1@120",
        "--exclusive",
        "--mem=0",
    ]
    lines = script.splitlines()
    assert lines.index("module load cuda") < lines.index("ulimit -n 9000")
    assert lines.index("ulimit -n 9000") < lines.index("set -u -o pipefail")
    settings = settings_of(script)
    assert settings["run"] == run
    assert settings["config"] == f"{run}/submissions/1/config.yaml"
    assert (settings["preflight"], settings["exclude_bad_nodes"]) == ("1", "1")
    assert settings["preflight_options"] == "--wait=300 --save=900"
    assert settings["NCCL_DEBUG"] == "WARN"
    assert settings["srun_options"] == "--cpus-per-task=96 --gpus-per-node=8"
    assert not Path(run).exists(), "--print leaves nothing"


def test_processes_replace_gpus_and_containers_come_before_python() -> None:
    flags = {"processes_per_node": 3, "preflight": False, "exclude_bad_nodes": False}
    flags |= {"container": "podman run image", "environment": {"A": "it's"}, "cpus_per_node": 12}
    cluster = load_cluster(REPOSITORY / "slurm" / "gpu-8.yaml", flags)
    script = render(Job(HERE, HERE / "submissions" / "4", members=5), cluster)
    assert_valid(script)
    assert not any("gpu" in option for option in options_of(script))
    assert "--array=0-4" in options_of(script)
    assert f"--output={HERE}/slurm-%A_%a.log" in options_of(script)
    settings = settings_of(script)
    assert settings["python"] == "podman run image python3"
    assert settings["A"] == "it's"
    assert (settings["preflight"], settings["exclude_bad_nodes"]) == ("", "")
    assert settings["run"] == f"{HERE}/7"
    assert settings["config"] == f"{HERE}/submissions/4/config-7.yaml"


def test_members_of_a_sweep_share_no_folder(config_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = [str(config_path), "run_dir=runs/one", "checkpoint.dir=s3://bucket/one"]
    words += ["--sweep", "train.seed=1,2", "--sweep", "optim.lr=0.1,0.2"]
    arguments = parser.parse_args(words)
    found = members(arguments, load_config(arguments.config, arguments.overrides))
    assert [(config.train.seed, config.optim.lr) for config in found] == [
        (1, 0.1),
        (1, 0.2),
        (2, 0.1),
        (2, 0.2),
    ]
    assert [config.run_dir for config in found] == [f"runs/one/{n}" for n in range(4)]
    assert [config.checkpoint.dir for config in found] == [f"s3://bucket/one/{n}" for n in range(4)]


def test_the_script_and_the_submission_keep_the_same_variables() -> None:
    script = render(Job(HERE, HERE / "1"), load_cluster(PRESETS[0], {}))
    assert f"grep -E '^{VARIABLES.pattern}'" in script
    assert f"grep -viE '^[^=]*({SECRET.pattern})'" in script


def test_times_in_files_are_text(tmp_path: Path) -> None:
    """YAML 1.1 takes 12:00:00 for 43200, which SLURM would take for minutes."""
    path = tmp_path / "cluster.yaml"
    path.write_text("time: 12:00:00\nprocesses_per_node: 0x10\n")
    cluster = load_cluster(path, {})
    assert (cluster.time, cluster.seconds, cluster.processes) == ("12:00:00", 43200, 16)


@pytest.mark.parametrize(
    ("file", "words", "code", "expected"),
    [
        ("", "", 2, "gpus_per_node: missing; say how many, or processes_per_node"),
        ("", "--gpus-per-node 8 --processes-per-node 8", 2, "given beside gpus_per_node"),
        ("", "--nodes 0 --processes-per-node 1", 2, "command line: nodes: input should be greater"),
        ("gpus: 8", "", 2, "cluster.yaml:1:1: gpus: unknown option"),
        ("gpus_per_nod: 8", "", 2, "did you mean gpus_per_node?"),
        ("nodes: two", "--gpus-per-node 1", 2, "cluster.yaml:1:1: nodes: input should be a valid"),
        ("- 1", "--gpus-per-node 1", 2, "a config file is a mapping"),
        ("", "--processes-per-node 1 --lead 119", 2, "lead: input should be greater than or equal"),
        ("", "--processes-per-node 1 --time 00:03:00", 2, "asked to stop 180 seconds (lead)"),
        ("", "--processes-per-node 1 --time 90", 2, "command line: time: string should match"),
        ("", "--processes-per-node 1 --partition 'a b'", 2, "partition: string should match"),
        ("", "--processes-per-node 1 --option=-x", 2, "options.0: string should match"),
        ("", "--processes-per-node 4 --cpus-per-node 2", 2, "2 for 4 processes"),
        ("environment: {'a b': c}", "--processes-per-node 1", 2, "environment"),
        ("", "--processes-per-node 1 --sweep train.seed", 2, "path.to.option=value,value"),
        ("", "--processes-per-node 1 --sweep train.seed=1", 2, "path.to.option=value,value"),
        ("", "--processes-per-node 1 --sweep train.sed=1,2", 2, "did you mean seed?"),
        ("", "--processes-per-node 1 --sweep run_dir=a,b", 2, "run_dir cannot be swept"),
        ("", "--processes-per-node 1 --preflight-option=60", 2, "preflight_options.0: string"),
        (
            "",
            "--processes-per-node 1 --setup 'if true; then'",
            2,
            "setup or container: bash cannot",
        ),
        ("", "--processes-per-node 1 --container 'a (b'", 2, "setup or container: bash cannot"),
        ("", "--processes-per-node 5", 5, "there are 5 data-parallel processes"),
        ("", "--nodes 3 --processes-per-node 1 --print", 0, ""),
        ("", "--nodes 3 --processes-per-node 2", 5, "there are 6 data-parallel processes"),
    ],
)
def test_what_is_refused(
    config_path: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    file: str,
    words: str,
    code: int,
    expected: str,
) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(file)
    arguments = ["submit", str(config_path), "--cluster", str(path), *shlex.split(words)]
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert expected in error
    assert len(error.splitlines()) == (code != 0)


def test_layouts_and_files_that_are_wrong(
    config_path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refused(*words: str) -> tuple[int, str]:
        code = main(["submit", *words, "--processes-per-node", "2", "--nodes", "2"])
        (line,) = capsys.readouterr().err.splitlines()
        return code, line

    code, line = refused(str(config_path), "parallel.pp=3")
    assert (code, "4" in line) == (5, True), line
    code, line = refused(str(tmp_path / "absent.yaml"))
    assert (code, "absent.yaml: cannot read the config file" in line) == (2, True)
    code, line = refused(str(config_path), "run_dir=/runs/a b")
    assert (code, "'/runs/a b' has characters that sbatch" in line) == (7, True)
    code, line = refused(str(config_path), "--cluster", str(tmp_path / "none.yaml"))
    assert (code, "none.yaml: cannot read" in line) == (2, True)


def test_without_sbatch_it_is_one_line(
    config_path: Path,
    run_tree: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", str(config_path), "--processes-per-node", "1"]) == 7
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: sbatch: not found on PATH")
    assert not Path(run_tree["run_dir"]).exists()


@pytest.mark.parametrize(
    ("said", "short"),
    [
        (
            "sbatch: error: invalid partition specified: nope\n"
            "sbatch: error: Batch job submission failed: Invalid partition name specified\n",
            "Invalid partition name specified",
        ),
        (
            "allocation failure: Requested node configuration is not available\n",
            "Requested node configuration is not available",
        ),
        ("\n", "refused, without a reason"),
    ],
)
def test_refusals_are_shortened_to_their_reason(said: str, short: str) -> None:
    """What SLURM 22.05 says."""
    assert reason(said) == short


def test_a_submission_keeps_what_it_was_made_from_and_no_secrets(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NCCL_DEBUG", "SLURM_JWT", "TORCH_API_KEY", "HOME_GROWN"):
        monkeypatch.setenv(name, "value")
    config = load_config(config_path)
    run = Path(config.run_dir)
    folder = next_folder(run)
    assert folder == run / "submissions" / "1"
    write(folder, "echo\n", {"config.yaml": config})
    assert next_folder(run) == run / "submissions" / "2"
    assert load_config(folder / "config.yaml") == config
    found = yaml.safe_load((folder / "config.yaml").read_text())
    assert RunConfig.model_validate(found) == config
    environment = (folder / "environment").read_text().split()
    assert "NCCL_DEBUG=value" in environment
    assert not [line for line in environment if "JWT" in line or "KEY" in line or "HOME" in line]
    assert re.search(r"^torch==2", (folder / "packages").read_text(), re.MULTILINE)
    commit = (folder / "code").read_text().strip()
    head = subprocess.run(
        ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    assert commit == head.stdout.strip() or commit.startswith("not in a git checkout")
    assert jobs_of(run) == []
    note_jobs(folder, ["12", "13"])
    assert jobs_of(run) == ["12", "13"]
    assert jobs_of(run / "3") == ["12_3", "13_3"], "a member of an array"
