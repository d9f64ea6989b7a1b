"""What the documents name exists."""

import os
import re
import shlex
import shutil
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml

from moebius.trainer.cli import COMMANDS, main
from moebius.trainer.config import RunConfig, problems
from moebius.trainer.config_file import load_config
from tests.trainer.helpers import logged, moebius, write_config

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_paths_exist(document: Path) -> None:
    text = document.read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    for link in links:
        assert (document.parent / link).exists(), link
    named = re.findall(r"\b((?:configs|tests|benchmarks|docs)/[\w./-]*\w)", text)
    for path in [*named, *("moebius/" + p for p in re.findall(r"`moebius/([\w/]+\.py)`", text))]:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_tests_exist(document: Path) -> None:
    for path, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", document.read_text()):
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"


@pytest.mark.parametrize("routing", ["routing", "recursion"])
def test_every_preset_is_in_its_document(routing: str) -> None:
    text = (ROOT / "docs" / f"{routing}.md").read_text()
    for path in (ROOT / "configs" / routing).glob("*.yaml"):
        assert f"(../configs/{routing}/{path.name})" in text, path


def test_tests_named_without_their_folder_exist() -> None:
    """docs/routing.md shortens tests/model/moe/test_oracles_...py::name."""
    text = (ROOT / "docs" / "routing.md").read_text()
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", text)
    assert len(named) > 20
    for file, name in named:
        source = (ROOT / "tests" / "model" / "moe" / file).read_text()
        assert f"def {name}" in source, f"{file}::{name}"


def test_the_worked_example_trains(run_tree: dict[str, Any], tmp_path: Path) -> None:
    """The example of docs/routing.md: one new file and a registry entry make a system."""
    text = (ROOT / "docs" / "routing.md").read_text()
    python, diff, fragment = (
        re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL).group(1)  # type: ignore[union-attr]
        for kind in ("python", "diff", "yaml")
    )
    shutil.copytree(ROOT / "moebius", tmp_path / "moebius")
    new_file = tmp_path / python.splitlines()[0].removeprefix("# ")
    assert not new_file.exists()
    new_file.write_text(python)
    registry = tmp_path / "moebius" / "model" / "moe" / "registry.py"
    registry.write_text(patched(registry.read_text(), diff))

    selector = yaml.safe_load(fragment)["model"]["ffn"]["router"]["selector"]
    ffn = {"kind": "moe", "experts": [{"kind": "ffn", "count": 8, "intermediate_size": 16}]}
    model = run_tree["model"] | {"ffn": ffn | {"router": {"selector": selector}}}
    path = write_config(run_tree | {"model": model}, tmp_path / "min_p.yaml")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = moebius("train", path, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    losses = [line["train/loss"] for line in logged(run_tree["run_dir"]) if "train/loss" in line]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    per_token = [line.get("width/experts_per_token") for line in logged(run_tree["run_dir"])]
    assert any(value is not None and 1 < value < 4 for value in per_token)
    unknown = moebius("describe", path, env=os.environ)
    assert "'min_p' is not allowed" in unknown.stderr, "without the two changes it is no selector"


def patched(source: str, diff: str) -> str:
    """`source` after a diff whose hunks have no line numbers."""
    for hunk in diff.split("@@\n")[1:]:
        lines = hunk.splitlines()
        old = "\n".join(line[1:] for line in lines if line[0] == "-")
        new = "\n".join(line[1:] for line in lines if line[0] == "+")
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def test_every_feature_names_a_test() -> None:
    rows = [
        line for line in (ROOT / "docs" / "features.md").read_text().splitlines() if "|" in line
    ]
    for row in rows[2:]:
        assert "`tests/" in row, row


def test_commands_of_the_readme_are_understood() -> None:
    """Every `moebius ...` in the README is a command, and its config and overrides are valid."""
    commands = re.findall(r"`(moebius [^`]+)`", (ROOT / "README.md").read_text())
    assert len(commands) >= 5
    for command in commands:
        _, name, *arguments = shlex.split(command)
        assert name in COMMANDS, command
        if name in ("train", "describe"):
            overrides = takewhile(lambda word: not word.startswith("--"), arguments[1:])
            load_config(ROOT / arguments[0], list(overrides))


def test_three_commands_train_on_own_text(
    corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first commands of docs/data.md, as they stand there; the run is made a short one."""
    (tmp_path / "my").mkdir()
    shutil.copy(corpus_file, tmp_path / "my" / "modules.jsonl")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "data.md").read_text()
    commands = [line for line in text.splitlines() if line.startswith("    moebius ")][:3]
    assert [shlex.split(command)[1] for command in commands] == ["prepare", "inspect", "train"]
    short = ["train.num_steps=2", "train.batch_size=2", "evaluation.num_batches=1"]
    short += ["optim.schedule.warmup_steps=1", "optim.schedule.decay_fraction=0.1"]
    for command in commands:
        _, *arguments = shlex.split(command)
        assert main([*arguments, *(short if arguments[0] == "train" else [])]) == 0
    assert [line["step"] for line in logged(Path("runs/mine")) if "train/loss" in line] == [1, 2]


def test_examples_of_the_data_guide_are_valid(run_tree: dict[str, Any]) -> None:
    """Every other command is understood, every fragment validates."""
    text = (ROOT / "docs" / "data.md").read_text()
    for command in re.findall(r"^    (moebius prepare .*)$", text, re.MULTILINE):
        _, _, config, *overrides = shlex.split(command)
        load_config(ROOT / config, overrides)
    fragments = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(fragments) == 2
    for fragment in fragments:
        data = yaml.safe_load(fragment)["data"]
        config = RunConfig.model_validate(run_tree | {"data": data})
        assert not list(problems(config))
