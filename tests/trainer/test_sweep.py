"""One checkpoint at other depths: each exit in evaluation, each setting of a sweep."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.data.batch import Batch
from moebius.errors import ConfigError
from moebius.model.config import ModelConfig
from moebius.model.context import StepContext
from moebius.model.cost import forward_flops
from moebius.model.executor import LocalExecutor
from moebius.model.ledger import Ledger
from moebius.trainer.config import RunConfig
from moebius.trainer.evaluation import evaluate
from moebius.trainer.metrics import executed_rows
from moebius.trainer.sweep import Outcome, Setting, best_settings, program_of, settings, sweep
from tests.conftest import MOE, model_tree
from tests.model.helpers import build, random_batch, scale_parameters
from tests.model.recursion.conftest import one_thread
from tests.trainer.helpers import train_run
from tests.trainer.test_depth_commands import DENSE, LOOP, command, run_of

__all__ = ["one_thread"]
MIXTURE = {"kind": "mixture", "num_experts": 4, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
CPU = torch.device("cpu")
CAUSAL = StepContext("threshold", Ledger(), step=9)
PLAIN: dict[str, dict[str, Any]] = {
    "cycle": {"depth": {"num_layers": 4, "sharing": "cycle", "num_recursions": 2}},
    "sequence": {"depth": {"num_layers": 4, "sharing": "sequence", "num_recursions": 2}},
    "middle_cycle": {"depth": LOOP},
    "groups": {"depth": {"num_layers": 4, "sharing": "cycle", "num_recursions": 2, "groups": 2}},
    "shared_first": {"depth": LOOP | {"kv": "shared_first"}},
    "norm scaling": {"depth": LOOP, "layer_norm_scaling": "unrolled"},
    "bdh": {
        "depth": {"num_layers": 2, "sharing": "cycle", "num_recursions": 2},
        "attention": {"kind": "bdh", "num_heads": 2, "neurons": 16},
        "ffn": {"kind": "none"},
    },
}
"""models that know no number of passes"""
FIXED: dict[str, dict[str, Any]] = {
    "adapter": {"depth": LOOP | {"adapter": {"kind": "gain"}}},
    "moe": {"depth": LOOP, "ffn": MOE},
    "mixture": {"depth": LOOP, "attention": MIXTURE},
    "expert": {"depth": LOOP | {"router": {}}},
    "token": {"depth": LOOP | {"router": {"kind": "token_choice"}}},
}
"""models that have parameters or state for each pass"""


def model(**changes: Any) -> LocalExecutor:
    """Selections are clear, and every pass matters."""
    executor = build(torch.float64, **({"ffn": DENSE} | changes))
    for part, factor in (("layers", 5.0), ("depth_routers", 30.0), ("embedding", 10.0)):
        scale_parameters(executor, part, factor)
    return executor


def batches(count: int = 2) -> list[Batch]:
    """Batches of 3 rows of 12 tokens."""
    return [Batch(**vars(random_batch(3, 12, seed))) for seed in range(count)]


def naive_losses(executor: LocalExecutor, batch: Batch, step: StepContext) -> Tensor:
    """Of each row, from its whole logits."""
    with torch.no_grad():
        logits_BSV = executor.decoder.logits(executor.hidden(batch, step))
    return torch.stack(
        [F.cross_entropy(*row) for row in zip(logits_BSV, batch.labels_BS, strict=True)]
    )


@pytest.mark.parametrize("router", [None, {}, {"kind": "token_choice"}])
def test_evaluation_reports_every_exit(router: dict[str, Any] | None) -> None:
    """As the model that ends there; bits of the same bytes; nothing else is reported."""
    after = [1, 3] if router == {} else [1, 5]
    executor = model(depth=LOOP | {"router": router}, exits={"after": after})
    bytes_V = torch.arange(512) % 3 + 1
    got = evaluate(executor, batches(), bytes_V, CPU, 9, 0)
    exits = {number: f"exit_{number}_" for number in after} | {6: ""}
    topk = ["topk_"] if router == {} else []
    assert set(got) == {
        f"eval/{name}{unit}"
        for name in [*exits.values(), *topk]
        for unit in ("loss", "bits_per_byte")
    }
    for number, name in exits.items():
        cut = LocalExecutor(executor.decoder, program=executor.decoder.program.until(number))
        losses = torch.cat([naive_losses(cut, batch, CAUSAL) for batch in batches()])
        assert got[f"eval/{name}loss"] == pytest.approx(float(losses.mean()), abs=1e-9)
        total_bytes = sum(int(bytes_V[batch.labels_BS].sum()) for batch in batches())
        bits = float(losses.mean()) * 72 / math.log(2) / total_bytes
        assert got[f"eval/{name}bits_per_byte"] == pytest.approx(bits, abs=1e-9)
    assert len({round(got[f"eval/{name}loss"], 6) for name in exits.values()}) == 3


@pytest.mark.parametrize("name", [*PLAIN, *FIXED])
def test_each_setting_is_a_direct_evaluation(name: str) -> None:
    """Samples' losses and FLOPs of up to the trained number of passes, the deepest the model's."""
    executor = model(**(PLAIN | FIXED)[name])
    chosen = list(settings(executor.decoder.config, None, [0.5, 1.0]))
    assert {setting.recursions for setting in chosen} == {1, 2}
    assert len(chosen) == (6 if name == "expert" else 2)
    outcomes = sweep(executor, batches(), chosen, CPU, CAUSAL)
    for outcome in outcomes:
        program = program_of(executor.decoder.config.depth, outcome.setting, CAUSAL.step)
        if outcome.setting.recursions == 2 and outcome.setting.scale == 1.0:
            assert program.visits == executor.program.visits
            program = executor.program
        runner, flops = LocalExecutor(executor.decoder, program=program), 0
        losses = []
        for batch in batches():
            step = StepContext(outcome.setting.mode, Ledger(), CAUSAL.step)
            losses.append(naive_losses(runner, batch, step))
            flops += forward_flops(executor.decoder, step.ledger.work, executed_rows(step.ledger))
        torch.testing.assert_close(outcome.sample_losses_R, torch.cat(losses), rtol=0, atol=1e-9)
        assert outcome.flops_per_token * 72 == flops
    by_depth = [o.flops_per_token for o in outcomes if o.setting.mode == "threshold"]
    assert by_depth[0] < by_depth[1]


def test_scales_are_factors_on_the_shares() -> None:
    """Of what the schedule gives at the checkpoint's step, never more than all tokens."""
    router = {"capacities": [1.0, [[0, 0.8], [10, 0.4]]]}
    executor = model(depth=LOOP | {"router": router})
    for scale, wanted in ((0.5, (0.5, 0.3)), (1.0, (1.0, 0.6)), (3.0, (1.0, 1.0))):
        depth = executor.decoder.config.depth
        program = program_of(depth, Setting(2, "topk", scale), 5)
        assert program.segments[1].shares(0) == pytest.approx(wanted)
    warm = model(depth=LOOP | {"router": {"warmup_steps": 10}}).decoder.config.depth
    program = program_of(warm, Setting(2, "topk", 1.0), 5)
    assert program.segments[1].shares(0) == pytest.approx((1.0, 0.75)), "half way from 1 to 1/2"


@pytest.mark.parametrize("name", PLAIN)
def test_plain_recursion_goes_on(name: str) -> None:
    """More passes than trained: each loop's block is run that often, one pass after another."""
    executor = model(**PLAIN[name])
    (setting,) = settings(executor.decoder.config, [4], [1.0])
    (outcome,) = sweep(executor, batches(1), [setting], CPU, CAUSAL)
    (trained,) = sweep(executor, batches(1), [Setting(2, "threshold", 1.0)], CPU, CAUSAL)
    assert outcome.flops_per_token > trained.flops_per_token
    program = program_of(executor.decoder.config.depth, setting, 0)
    order = {
        "cycle": "01010101",
        "sequence": "00001111",
        "groups": "00001111",
        "bdh": "0000",
    }.get(name, "0121212123")
    assert "".join(visit.layer for visit in program.visits) == order
    batch = batches(1)[0]
    if name == "cycle":  # the model whose layers are copies
        unrolled = build(torch.float64, ffn=DENSE, depth={"num_layers": 8})
        weights = executor.decoder.state_dict()
        copies = {
            key: weights[key]
            if not key.startswith("layers.")
            else weights[f"layers.{int(key.split('.')[1]) % 2}.{key.split('.', 2)[2]}"]
            for key in unrolled.decoder.state_dict()
        }
        unrolled.decoder.load_state_dict(copies)
        wanted = naive_losses(unrolled, batch, CAUSAL)
        torch.testing.assert_close(outcome.sample_losses_R, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", FIXED)
def test_passes_that_differ_end_with_the_last(name: str) -> None:
    config = ModelConfig.model_validate(model_tree(**({"ffn": DENSE} | FIXED[name])))
    with pytest.raises(ConfigError) as caught:
        list(settings(config, [1, 3], [1.0]))
    assert str(caught.value) == (
        "--recursions: 3, but the passes of this model differ and it has 2 - use numbers up to 2"
    )


def test_the_bound_takes_the_best_setting_of_each_sample() -> None:
    """Of equal ones the first."""
    losses = [[3.0, 1.0, 2.0, 5.0], [2.0, 4.0, 2.0, 4.0], [9.0, 9.0, 9.0, 9.0]]
    outcomes = [Outcome(Setting(1, "threshold", 1.0), torch.tensor(row), 1.0) for row in losses]
    bound, wins = best_settings(outcomes)
    assert bound == (2 + 1 + 2 + 4) / 4
    assert wins.tolist() == [2, 2, 0]
    assert all(bound <= outcome.loss for outcome in outcomes)


def test_the_table(
    run_tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings in order, and the loss that `moebius evaluate` gives for the trained one."""
    tree = model_tree(ffn=DENSE, depth=LOOP)
    folder = train_run(run_of(run_tree, tmp_path, "run", model=tree)).folder
    evaluated = command(capsys, "evaluate", folder)[1].split("validation loss ")[1][:6]
    code, out, _ = command(capsys, "sweep", folder, "--recursions", "1", "2", "4")
    assert code == 0
    rows = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert [row[0] for row in cells] == ["1 pass", "2 passes", "4 passes"]
    assert {row[1] for row in cells} == {"causally"}
    assert cells[1][2] == evaluated
    costs = [float(row[3]) for row in cells]
    assert costs == sorted(set(costs))
    bound = float(out.split("best setting for each sample: ")[1])
    assert bound <= min(float(row[2]) for row in cells)
    assert sum(int(row[4].removesuffix("%")) for row in cells) == pytest.approx(100, abs=1)
    one = command(capsys, "sweep", folder, "--num-batches", "1")[1]
    assert "step 6, 4 samples" in one
    assert "step 6, 8 samples" in out


def test_a_dense_model_has_no_depth_to_sweep(
    run_tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = model_tree(ffn=DENSE, depth={"num_layers": 2})
    config = RunConfig.model_validate(run_tree | {"run_dir": str(tmp_path / "d"), "model": dense})
    folder = train_run(config, stop_after=1).folder
    code, _, errors = command(capsys, "sweep", folder)
    assert code == ConfigError.exit_code
    assert errors == "error: model.depth.num_recursions: 1, so there is no depth to sweep\n"
