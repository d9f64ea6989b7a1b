"""Fixtures shared by all tests: real text in small amounts, and configs that train in seconds."""

import json
import sysconfig
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius.data.config import DataConfig, FilesSource
from moebius.data.corpus import Corpora
from moebius.data.manifest import Manifest
from moebius.data.prepare import Workshop, prepare
from moebius.trainer.config import RunConfig

VOCAB_SIZE = 512
QUIET = Workshop(lambda line: None)
MODULES = ("argparse", "ast", "calendar", "configparser", "csv", "datetime", "difflib", "enum")
"""standard-library modules whose source is the corpus of the tests"""


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file: one document per top-level block of a few standard-library modules."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    path = tmp_path_factory.mktemp("corpus") / "modules.jsonl"
    with path.open("w") as file:
        for module in MODULES:
            text = (stdlib / f"{module}.py").read_text(encoding="utf-8")
            for block in text.split("\n\n\n"):
                file.write(json.dumps({"text": block + "\n"}) + "\n")
    return path


@pytest.fixture(scope="session")
def data_config(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return DataConfig(
        dir=str(tmp_path_factory.mktemp("prepared")),
        source=FilesSource(paths=(str(corpus_file),)),
        sequence_length=32,
        validation_fraction=0.1,
    )


@pytest.fixture(scope="session")
def corpora(data_config: DataConfig) -> Corpora:
    """The prepared corpus of the tests, made once."""
    return prepare(data_config, VOCAB_SIZE, QUIET)


@pytest.fixture(scope="session")
def manifest(corpora: Corpora) -> Manifest:
    return corpora.first.manifest


MOE = {
    "kind": "moe",
    "experts": [
        {"kind": "ffn", "count": 4, "intermediate_size": 24},
        {"kind": "constant", "count": 2},
        {"kind": "copy"},
        {"kind": "zero"},
    ],
    "router": {
        "scorer": {"kind": "linear", "gating_residual": "prev_layer"},
        "weights": {"kind": "drop_null_renormalize"},
        "losses": [{"kind": "switch", "tau": 0.75, "scope": "sequence"}],
    },
}
"""its loss has a gradient from the first step on, unlike one of scope `global`"""


def model_tree(**changes: Any) -> dict[str, Any]:
    """A model of a few thousand parameters with both routings, as a config tree."""
    tree: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
        "ffn": MOE,
        "depth": {
            "num_layers": 6,
            "sharing": "middle_cycle",
            "num_recursions": 2,
            "router": {"causal": {"coefficient": 0.01}},
        },
    }
    return tree | changes


@pytest.fixture
def run_tree(data_config: DataConfig, manifest: Manifest, tmp_path: Path) -> dict[str, Any]:
    """A run of a few seconds on the prepared corpus, as a config tree to change and validate."""
    return {
        "run_dir": str(tmp_path / "run"),
        "model": model_tree(),
        "data": data_config.model_dump(),
        "train": {"num_steps": 6, "batch_size": 4, "micro_batch_size": 2, "device": "cpu"},
        "optim": {"lr": 1e-2, "schedule": {"kind": "cosine", "warmup_steps": 2}},
        "evaluation": {"interval": 3, "num_batches": 2},
        "checkpoint": {"interval": 3, "keep": 2},
        "log": {"interval": 1},
        "cpu": {"fp32_products": "mkl"},  # which this process uses, too: products are compared
    }


@pytest.fixture
def run_config(run_tree: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(run_tree)


@pytest.fixture(autouse=True)
def settings_of_the_process() -> Iterator[None]:
    """What a command sets for the whole process is set back after each test."""
    threads, precision = torch.get_num_threads(), torch.backends.mkldnn.matmul.fp32_precision
    yield
    torch.set_num_threads(threads)
    torch.backends.mkldnn.matmul.fp32_precision = precision


@pytest.fixture(scope="module")
def warm() -> Iterator[None]:
    """For tests that fork: one thread, and everything imported that an optimizer step imports when
    it first needs it, which would take each forked process seconds."""
    import_module("moebius.parallel.fsdp")
    layouts = import_module("tests.parity.layouts")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    layouts.train("dense", layouts.Case())
    yield
    torch.set_num_threads(threads)
