"""DeepSpeed's ZeRO under our layers gives what one process gives, and goes on where it stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moebius.errors import CheckpointError, LayoutError
from moebius.model.config import ModelConfig
from moebius.model.context import StepContext
from moebius.model.decoder import Decoder
from moebius.model.executor import LocalExecutor, TokenBatch
from moebius.model.ledger import Ledger
from moebius.model.parameters import ParameterSpec, Role
from moebius.parallel import deepspeed as under_test
from moebius.parallel.batch import row_ranges
from moebius.parallel.config import DeepSpeedConfig, ParallelConfig
from moebius.parallel.deepspeed import DeepSpeedEngine
from moebius.parallel.deepspeed_rules import deepspeed_problems
from moebius.parallel.engine import Engine, MakeOptimizer, ReplicatedEngine
from moebius.parallel.ledger import merge_results
from moebius.parallel.mesh import Mesh
from moebius.parallel.part import Part
from moebius.parallel.place import place, row_spread
from tests.model.helpers import rows_of
from tests.model.recursion.systems import depth, expert
from tests.parity.forks import run_forked
from tests.parity.layouts import CLIPS, FIRST_STEP, Case, decoder_of, documents, sgd
from tests.parity.whole import fill_parts, model_tensors, whole_tensors

pytest.importorskip("deepspeed")
# What DeepSpeed imports at its start takes many seconds; forked processes then have it already.
pytest.importorskip("deepspeed.runtime.zero.muon.muon_optimizer")
pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
ROUNDING = 4e-7
"""of fp32 parameters, relative to their largest: what an update, a difference, cannot show"""


def adamw(parameters: Iterable[tuple[nn.Parameter, ParameterSpec]]) -> torch.optim.Optimizer:
    """Two groups; an `eps` that keeps rounding of gradients near zero from showing."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter, spec in parameters:
        groups[spec.role is Role.NORM_IN].append(parameter)
    options = [{"params": groups[True], "weight_decay": 0.0}, {"params": groups[False]}]
    return torch.optim.AdamW(options, lr=0.01, weight_decay=0.1, eps=1e-3, fused=True)


class System:
    """A model on some layout."""

    def __init__(self, decoder: Decoder, config: ParallelConfig, make: MakeOptimizer) -> None:
        self.decoder = decoder
        self.mesh = Mesh(config)
        self.placed = place(decoder, config, self.mesh, {})
        self.executor = LocalExecutor(decoder, spread=row_spread(config, self.mesh))
        self.engine: Engine
        if config.engine == "deepspeed":
            os.environ["LOCAL_RANK"] = str(dist.get_rank())
            engine = DeepSpeedEngine(decoder, self.placed, self.mesh, make, config.deepspeed)
            self.engine, self.executor.differentiate = engine, engine.differentiate
        else:
            self.engine = ReplicatedEngine(self.placed, self.mesh, make)

    def step(self, number: int, case: Case, clip_norm: float) -> dict[str, Tensor]:
        """One optimizer step; losses, statistics and the gradients' norm."""
        batch = documents(case.rows)
        context = StepContext(
            "topk",
            Ledger(),
            step=FIRST_STEP + number,
            seed=7,
            training=True,
            recompute=case.recompute,
        )
        result = self.executor.accumulate_gradients(
            self.parts(batch, case), context, None, batch.labels_BS.numel()
        )
        result = merge_results(result, self.mesh)
        found = {f"loss/{name}": loss for name, loss in result.losses.items()}
        found |= {f"auxiliary/{name}": loss for name, loss in result.ledger.losses.items()}
        weights = self.mesh.world.all_reduce(self.engine.weight_square().clone())
        found["grad_norm"] = self.engine.step(clip_norm)
        found["weight_norm"] = weights.sqrt()
        self.decoder.update_routers(result.ledger, FIRST_STEP + number)
        return found

    def parts(self, batch: TokenBatch, case: Case) -> list[TokenBatch]:
        """The own micro-batches."""
        ranges = row_ranges(case.rows, case.micro_batch, self.mesh.dp.rank, self.mesh.dp.size)
        return [rows_of(batch, start, end) for start, end in ranges]


def small_buffers(config: DeepSpeedConfig) -> dict[str, Any]:
    """So small that nothing is whole for long, as with large models."""
    tree = original_settings(config)
    tree["zero_optimization"] |= {"reduce_bucket_size": 500, "allgather_bucket_size": 500}
    if config.stage == 3:
        tree["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 300,
            "stage3_max_live_parameters": 1000,
            "stage3_max_reuse_distance": 100,
        }
    return tree


original_settings: Callable[[DeepSpeedConfig], dict[str, Any]] = under_test.settings


def train(name: str, case: Case, make: MakeOptimizer = sgd, steps: int = 2) -> dict[str, Any]:
    """Optimizer steps; what they leave behind, as arrays by name."""
    under_test.settings = small_buffers
    decoder = decoder_of(name, torch.float32)
    before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    system = System(decoder, case.config, make)
    left: dict[str, Any] = {}
    for number in range(steps):
        left |= arrays(f"{number}/", system.step(number, case, CLIPS[number % 2]))
        after = {k: t.clone() for k, t in model_tensors(system.engine.parts()).items()}
        left |= arrays(f"{number}/parameter/", after)
        left |= arrays(f"{number}/update/", {k: after[k] - before[k] for k in after})
        before = after
        if case.options.get("deepspeed", {}).get("stage") == 3:
            assert all(p.parameter.numel() == 0 for p in system.placed), "a parameter stayed whole"
    return left


def arrays(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Copies that can be sent to another process."""
    return {prefix + k: t.detach().double().cpu().numpy().copy() for k, t in tensors.items()}


@cache
def reference(name: str, rows: int, make: MakeOptimizer = sgd, steps: int = 2) -> dict[str, Any]:
    """One process, the whole batch at once, without DeepSpeed."""
    return run_forked(1, train, name, Case(1, {}, rows, rows), make, steps)[0]


def assert_equal(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Every array, relative to the largest element of its kind."""
    assert got.keys() == expected.keys()
    wrong = []
    for key, value in expected.items():
        allowed = TOLERANCE * max(float(np.abs(value).max(initial=0.0)), 1e-6)
        if "/update/" in key:
            whole = expected[key.replace("/update/", "/parameter/")]
            allowed += ROUNDING * float(np.abs(whole).max(initial=0.0))
        error = float(np.abs(got[key] - value).max(initial=0.0))
        if not error <= allowed:
            wrong.append(f"{key}: {error:.1e} > {allowed:.1e}")
    assert not wrong, wrong[:20]


def deepspeed(stage: int, processes: int = 2, offload: bool = False, **options: Any) -> Case:
    """A case with DeepSpeed."""
    shape = {
        key: options.pop(key) for key in ("rows", "micro_batch", "recompute") if key in options
    }
    node = {"stage": stage, "offload_optimizer": offload}
    return Case(processes, {"engine": "deepspeed", "deepspeed": node} | options, **shape)


CASES: dict[str, Case] = {
    **{f"stage {stage}": deepspeed(stage, micro_batch=1) for stage in (1, 2, 3)},
    **{
        f"stage {stage} on 4, uneven": deepspeed(stage, 4, rows=6, micro_batch=1, recompute="full")
        for stage in (1, 2, 3)
    },
}
AXES: dict[str, Case] = {
    "stage 3, selective": deepspeed(3, recompute="selective"),
    **{f"stage {stage} offload": deepspeed(stage, offload=True, micro_batch=1) for stage in (1, 2)},
    "stage 3 offload": deepspeed(3, offload=True, micro_batch=1),
    **{f"stage {stage} sp": deepspeed(stage, 4, tp=2) for stage in (1, 2, 3)},
    **{
        f"stage {stage} tp": deepspeed(stage, 4, tp=2, etp=2, sequence_parallel=False)
        for stage in (1, 2, 3)
    },
    "stage 1 tp alone": deepspeed(1, 2, tp=2),
    "stage 2 copied heads": deepspeed(2, 4, tp=4),
    "stage 2 experts along tp": deepspeed(2, 4, tp=2, ep=2),
    "stage 1 cp": deepspeed(1, 4, cp=2, micro_batch=1),
    "stage 2 cp sp": deepspeed(2, 4, cp=2, tp=2),
    "stage 3 cp": deepspeed(3, 2, cp=2),
}


@pytest.mark.parametrize("name", ["dense", "moepp", "mor", "moepp_mor"])
@pytest.mark.parametrize("layout", CASES)
def test_equals_one_process(layout: str, name: str) -> None:
    case = CASES[layout]
    for result in run_forked(case.processes, train, name, case):
        assert_equal(result, reference(name, case.rows))


@pytest.mark.parametrize("layout", AXES)
def test_equals_one_process_along_other_axes(layout: str) -> None:
    case = AXES[layout]
    for result in run_forked(case.processes, train, "moepp_mor", case):
        assert_equal(result, reference("moepp_mor", case.rows))


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", ["v3", "mixed", "mor_token", "lora"])
def test_other_models_equal_one_process(name: str, stage: int) -> None:
    """Among them experts without elements, and a recurrent unit that several layers use."""
    case = deepspeed(stage, 2)
    for result in run_forked(2, train, name, case):
        assert_equal(result, reference(name, case.rows))


@pytest.mark.parametrize("layout", ["stage 1", "stage 3", "stage 2 offload", "stage 1 sp"])
def test_adamw_with_groups(layout: str) -> None:
    case = (CASES | AXES)[layout]
    for result in run_forked(case.processes, train, "moepp_mor", case, adamw, 3):
        assert_equal(result, reference("moepp_mor", case.rows, adamw, 3))


def interrupted(case: Case, state: dict[str, Any] | None) -> dict[str, Any]:
    """Two steps and their state; or, from a state, the third step."""
    under_test.settings = small_buffers
    decoder = decoder_of("moepp_mor", torch.float32)
    system = System(decoder, case.config, adamw)
    if state is not None:
        found = {key: torch.from_numpy(value).float() for key, value in state.items()}
        parts = system.engine.parts()
        fill_parts(parts, found)
        system.engine.take_over(parts)
        left = arrays("2/", system.step(2, case, CLIPS[0]))
        return left | arrays("2/parameter/", model_tensors(system.engine.parts()))
    for number in range(2):
        system.step(number, case, CLIPS[number])
    return arrays("", whole_tensors(system.engine.parts()))


RESUMED = {
    "2 to 4": (deepspeed(1, 2), deepspeed(1, 4, micro_batch=1)),
    "4 to 2": (deepspeed(3, 4, micro_batch=1), deepspeed(3, 2)),
    "stage 2 to 3": (deepspeed(2, 2), deepspeed(3, 4, micro_batch=1)),
    "tp to offload": (deepspeed(1, 4, tp=2), deepspeed(2, 2, offload=True)),
    "to native": (deepspeed(3, 2), Case(1, {})),
    "from native": (Case(1, {}), deepspeed(2, 4, tp=4)),
}


@pytest.mark.parametrize("change", RESUMED)
def test_goes_on_with_another_layout(change: str) -> None:
    """Whole tensors by name are all that a checkpoint has to hold."""
    first, second = RESUMED[change]
    expected = reference("moepp_mor", 4, adamw, 3)
    state = run_forked(first.processes, interrupted, first, None)[0]
    for result in run_forked(second.processes, interrupted, second, state):
        assert_equal(result, {key: expected[key] for key in result})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_goes_on_exactly(stage: int) -> None:
    case = deepspeed(stage, 2, micro_batch=1)
    whole = run_forked(2, train, "moepp_mor", case, adamw, 3)[0]
    state = run_forked(2, interrupted, case, None)[0]
    resumed = run_forked(2, interrupted, case, state)[0]
    assert len(resumed) > 10
    for key, value in resumed.items():
        np.testing.assert_array_equal(value, whole[key], key)


def with_evaluation(case: Case) -> dict[str, Any]:
    """Steps between which the model is evaluated."""
    under_test.settings = small_buffers
    system = System(decoder_of("mor", torch.float32), case.config, sgd)
    batch = documents(2)
    left: dict[str, Any] = {}
    for number in range(2):
        context = StepContext("topk", Ledger(), step=FIRST_STEP, seed=7)
        if isinstance(system.engine, DeepSpeedEngine):
            losses = system.engine.compute(lambda c=context: system.executor.token_losses(batch, c))
        else:
            losses = system.executor.token_losses(batch, context)
        left |= arrays(f"{number}/evaluation/", {str(k): t for k, t in losses.items()})
        left |= arrays(f"{number}/", system.step(number, case, CLIPS[number]))
        left |= arrays(f"{number}/parameter/", model_tensors(system.engine.parts()))
    return left


@pytest.mark.parametrize("stage", [2, 3])
def test_evaluates_between_steps(stage: int) -> None:
    expected = run_forked(1, with_evaluation, Case(1, {}))[0]
    for result in run_forked(2, with_evaluation, deepspeed(stage, 2, micro_batch=1)):
        assert_equal(result, expected)


def memory(case: Case) -> dict[str, int]:
    """Elements of parameters, and of the optimizer's state, that a process holds."""
    under_test.settings = small_buffers
    system = System(decoder_of("dense", torch.float32), case.config, adamw)
    system.step(0, case, 1.0)
    states = system.engine.optimizer.state.values()
    moments = sum(t.numel() for state in states for t in state.values() if t.dim())
    return {"whole": sum(p.parameter.numel() for p in system.placed), "moments": moments}


@pytest.mark.parametrize("stage", [1, 3])
def test_shares_out(stage: int) -> None:
    alone = run_forked(1, memory, Case(1, {}))[0]
    shared = run_forked(4, memory, deepspeed(stage, 4, micro_batch=1))
    for result in shared:
        assert result["moments"] < 0.27 * alone["moments"]
        assert result["whole"] == (0 if stage == 3 else alone["whole"])


def model_of(**fields: Any) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "vocab_size": 32,
            "hidden_size": 16,
            "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4},
            "ffn": {"kind": "dense", "intermediate_size": 24},
            "depth": {"num_layers": 2},
        }
        | fields
    )


@pytest.mark.parametrize(
    ("options", "fields", "path", "words"),
    [
        ({"pp": 2}, {}, "parallel.pp", "2 with engine deepspeed: it reduces gradients within"),
        ({"ep": 2}, {}, "parallel.ep", "ep * etp = 2 with engine deepspeed: it adds up all"),
        ({"ep": 2, "tp": 4}, {}, "parallel.ep", "use 1, tp = 4, or engine native"),
        ({"dp_replicate": 2}, {}, "parallel.dp_replicate", "use engine native with data fsdp2"),
        (
            {},
            {"depth": depth(router=expert(causal={"kind": "router"}))},
            "parallel.engine",
            "deepspeed, but the causal router over depths is clipped apart from the model",
        ),
        (
            {},
            {"exits": {"after": [1], "draw": "step"}},
            "parallel.engine",
            "deepspeed, but model.exits.draw=step leaves weights without gradients in some steps",
        ),
    ],
)
def test_refuses(options: dict[str, Any], fields: dict[str, Any], path: str, words: str) -> None:
    model = model_of(**fields)
    config = ParallelConfig.model_validate({"engine": "deepspeed"} | options)
    (problem,) = deepspeed_problems(config, model)
    assert problem.path == path
    assert words in problem.message
    assert not list(deepspeed_problems(ParallelConfig.model_validate(options), model))


@pytest.mark.parametrize("options", [{}, {"tp": 2}, {"tp": 4, "ep": 2, "etp": 2}, {"cp": 2}])
def test_allows(options: dict[str, Any]) -> None:
    config = ParallelConfig.model_validate({"engine": "deepspeed"} | options)
    assert not list(deepspeed_problems(config, model_of(depth=depth(router=expert()))))


def refusal(name: str, case: Case) -> str:
    try:
        System(decoder_of(name, torch.float32), case.config, sgd)
    except LayoutError as error:
        return str(error)
    return "none"


def test_refuses_what_would_be_wrong_without_a_sign() -> None:
    found = run_forked(2, refusal, "mor_document", deepspeed(1))[0]
    assert "is clipped apart from the model" in found
    found = run_forked(2, refusal, "moepp", deepspeed(1, ep=2))[0]
    assert "parallel.engine: deepspeed, but other processes reduce layers.0.ffn.experts" in found


def test_names_the_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'deepspeed'")

    monkeypatch.setattr(under_test, "import_module", missing)
    monkeypatch.setattr(under_test.dist, "is_initialized", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(LayoutError, match=r"parallel\.engine.*pip install 'moebius\[deepspeed\]'"):
        under_test.import_deepspeed(torch.device("cpu"))


def test_names_the_launcher_that_is_missing() -> None:
    with pytest.raises(LayoutError, match="torchrun"):
        under_test.import_deepspeed(torch.device("cpu"))


def test_refuses_steps_that_differ() -> None:
    values = {"optimizer/a/step": 2.0, "optimizer/b/step": 3.0}
    steps = {name: Part.of(torch.tensor(value)) for name, value in values.items()}
    with pytest.raises(CheckpointError, match="differently many steps"):
        DeepSpeedEngine.take_over(SimpleNamespace(), steps)  # type: ignore[arg-type]
