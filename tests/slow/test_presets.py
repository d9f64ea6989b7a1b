"""Every preset of both routings trains on text, uses what it routes to, and resumes exactly."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moebius.data.corpus import Corpora
from moebius.data.prepare import prepare
from moebius.trainer.callbacks.base import Callback, StepReport
from moebius.trainer.callbacks.checkpointing import CheckpointCallback
from moebius.trainer.callbacks.evaluation import EvaluationCallback
from moebius.trainer.callbacks.metrics import MetricsCallback
from moebius.trainer.callbacks.routing_recorder import RoutingRecorder
from moebius.trainer.callbacks.sinks import JsonlSink
from moebius.trainer.config import RunConfig
from moebius.trainer.config_file import load_config
from moebius.trainer.loop import train
from moebius.trainer.resume import resume
from moebius.trainer.run import Run
from tests.conftest import QUIET
from tests.trainer.helpers import REPOSITORY, logged, saved_state

CONFIGS = REPOSITORY / "configs"
PRESETS = sorted(
    str(path.relative_to(CONFIGS).with_suffix(""))
    for routing in ("routing", "recursion")
    for path in (CONFIGS / routing).glob("*.yaml")
)
STOPPED = 45
"""step of the checkpoint from which a run goes on a second time"""
RECORDED = "routing/duo_llm_random"
"""whose decisions duo_llm_replay repeats"""

WHOLE_BATCH = frozenset(
    f"routing/{name}"
    for name in (
        "chain_of_experts",
        "dtop_p",
        "dynamoe_row",
        "moepp",
        "moepp_released",
        "moepp_spill",
        "rexmoe",
        "xmoe",
    )
)
"""presets some of whose experts find no tokens in 50 steps of half a batch"""


class LastLoad(Callback):
    """Keeps, of the last steps, the assignments per expert and the selections per position."""

    def __init__(self) -> None:
        self.counts: dict[str, Tensor] = {}
        self.places: dict[str, Tensor] = {}

    def on_step_end(self, run: Run, report: StepReport) -> None:
        if run.step <= run.config.train.num_steps - 5:
            return
        for site, sums in report.ledger.statistics.items():
            for name, kept in (("expert_tokens", self.counts), ("places", self.places)):
                if name in sums:
                    kept[str(site)] = kept.get(str(site), 0) + sums[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("presets")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Corpora:
    """The quickstart's corpus."""
    return prepare(preset("routing/small", folder).data, 4096, QUIET)


def preset(name: str, folder: Path) -> RunConfig:
    """A preset with its run and its corpus in a folder of the test's; most take half of their
    batch, which saves half of their time."""
    overrides = [f"run_dir={folder / name}", f"data.dir={folder / 'data'}"]
    if name not in WHOLE_BATCH:
        overrides += ["train.batch_size=8", "train.micro_batch_size=4"]
    overrides.append(f"checkpoint.interval={STOPPED}")
    if name == "routing/duo_llm_replay":
        overrides.append(f"model.ffn.router.selector.path={folder / RECORDED / 'routing'}")
    return load_config(CONFIGS / f"{name}.yaml", overrides)


def run_to_the_end(config: RunConfig, corpora: Corpora) -> tuple[Run, LastLoad]:
    """From the newest checkpoint in the run folder, if there is one."""
    load = LastLoad()
    callbacks = [
        JsonlSink(),
        MetricsCallback(),
        EvaluationCallback(),
        RoutingRecorder(),
        CheckpointCallback(),
        load,
    ]
    run = Run(config, corpora, callbacks)
    run.folder.mkdir(parents=True, exist_ok=True)
    resume(run)
    train(run)
    return run, load


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_preset_learns_spreads_load_and_resumes(name: str, folder: Path, corpus: Corpora) -> None:
    """50 steps; then the last ones again from a checkpoint."""
    if name == "routing/duo_llm_replay":
        run_to_the_end(preset(RECORDED, folder), corpus)
    config = preset(name, folder)
    whole, load = run_to_the_end(config, corpus)
    assert whole.step == config.train.num_steps == 50
    expected = logged(whole.folder)

    evaluated = [line["eval/loss"] for line in expected if "eval/loss" in line]
    assert evaluated[-1] < evaluated[0] - 1.5
    trained = [line["train/loss"] for line in expected if "train/loss" in line]
    assert trained[-1] < trained[1] < trained[0]

    for site, counts in load.counts.items():
        effective = effective_experts(counts)
        print(f"{name} {site}: {effective:.1f} of {len(counts)} experts")
        assert effective >= max(1.5, len(counts) / 4), site
        assert float((counts == 0).float().mean()) <= 0.25, site

    for site, counts in load.places.items():
        never = float((counts == 0).float().mean())
        print(f"{name} {site}: {never:.0%} of the positions never selected")
        assert never <= 0.25, site

    shutil.rmtree(whole.folder / "checkpoints" / "step-00000050")
    resumed, _ = run_to_the_end(config, corpus)
    assert logged(resumed.folder) == expected
    a, b = saved_state(resumed), saved_state(whole)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def effective_experts(counts: Tensor) -> float:
    """How many equally loaded experts would have the same entropy of load."""
    share = counts / counts.sum()
    return float(torch.special.entr(share).sum().exp())
