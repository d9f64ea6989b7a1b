"""What the documents name exists."""

import re
import shlex
from pathlib import Path

import pytest

from moebius.trainer.cli import COMMANDS
from moebius.trainer.config_file import load_config

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
            load_config(ROOT / arguments[0], arguments[1:])
