"""Muon against a loop over single matrices, torch's own, and itself on other layouts."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from moebius.data.corpus import open_corpora
from moebius.errors import CheckpointError
from moebius.model.context import StepContext
from moebius.model.ledger import Ledger
from moebius.model.parameters import ParameterSpec, Role, named_specs
from moebius.parallel.config import ParallelConfig
from moebius.parallel.engine import ReplicatedEngine
from moebius.parallel.layout import Layout
from moebius.parallel.place import Placed
from moebius.parallel.zero import ZeroEngine, share_out
from moebius.trainer import muon
from moebius.trainer.checkpoint.loader import fill, newest_sound
from moebius.trainer.checkpoint.saver import Saver
from moebius.trainer.checkpoint.storage import LocalStorage
from moebius.trainer.config import CheckpointConfig, RunConfig, problems
from moebius.trainer.muon import Muon, MuonConfig, newton_schulz, normalized
from moebius.trainer.optim import OptimConfig, build_optimizer, muon_roles, set_lr
from moebius.trainer.resume import resume
from moebius.trainer.run import Run
from tests.conftest import model_tree
from tests.model.helpers import build
from tests.parity.forks import run_forked
from tests.parity.layouts import LAYOUTS, LENGTH, Case, Rows, decoder_of, documents, train
from tests.parity.whole import whole_tensors
from tests.trainer.helpers import logged, saved_state, train_run
from tests.trainer.saves import record

SHAPES: dict[str, tuple[tuple[int, ...], ParameterSpec]] = {
    "wide": ((6, 20), ParameterSpec(Role.MATRIX)),
    "tall": ((20, 6), ParameterSpec(Role.MATRIX)),
    "square": ((8, 8), ParameterSpec(Role.MATRIX)),
    "wide too": ((6, 20), ParameterSpec(Role.MATRIX)),
    "experts": ((3, 8, 12), ParameterSpec(Role.EXPERT)),
    "gate and up": ((3, 16, 12), ParameterSpec(Role.EXPERT, stacked=2)),
    "stacked": ((12, 20), ParameterSpec(Role.MATRIX, stacked=2)),
    "head": ((30, 8), ParameterSpec(Role.HEAD)),
    "gain": ((8,), ParameterSpec(Role.GAIN)),
}
Pairs = list[tuple[nn.Parameter, ParameterSpec]]


def parameters(dtype: torch.dtype = torch.float64) -> Pairs:
    """One of each kind."""
    generator = torch.Generator().manual_seed(1)
    return [
        (nn.Parameter(torch.randn(shape, generator=generator).to(dtype)), spec)
        for shape, spec in SHAPES.values()
    ]


def give_gradients(pairs: Pairs, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter, _ in pairs:
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad = scale * noise.to(parameter.dtype)


def singles(tensor: Tensor, stacked: int) -> Iterator[Tensor]:
    """Each matrix of a parameter, as a view, by plain indexing."""
    for whole in [tensor] if tensor.dim() == 2 else [tensor[i] for i in range(len(tensor))]:
        rows = whole.shape[0] // stacked
        for number in range(stacked):
            yield whole[number * rows : (number + 1) * rows]


def orthogonal(matrix: Tensor, steps: int) -> Tensor:
    """The iteration as it is published, by ordinary products."""
    x = matrix / max(float(matrix.norm()), 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * (gram @ x) + 2.0315 * (gram @ gram @ x)
    return x


class Loop:
    """Muon, one matrix after the other."""

    def __init__(self, pairs: Pairs, config: MuonConfig, lr: float, decay: float) -> None:
        self.config, self.lr, self.decay = config, lr, decay
        self.members = [
            (p, p.detach().clone(), torch.zeros_like(p), spec.stacked)
            for p, spec in pairs
            if spec.role.value in config.roles
        ]

    def step(self) -> None:
        for parameter, values, momenta, stacked in self.members:
            assert parameter.grad is not None
            for w, m, g in zip(
                *(singles(t, stacked) for t in (values, momenta, parameter.grad)), strict=True
            ):
                keep = self.config.momentum
                m.copy_(keep * m + (1 - keep) * g)
                d = keep * m + (1 - keep) * g if self.config.nesterov else m
                scale = 0.2 * math.sqrt(max(w.shape))
                o = orthogonal(d, self.config.ns_steps)
                w.copy_(w - self.lr * (scale * o + self.decay * w))


def optimizer_of(pairs: Pairs, dtype: torch.dtype | None = None, **config: Any) -> Muon:
    tree = {"muon": {}, **config}
    made = build_optimizer(pairs, OptimConfig.model_validate(tree), dtype)
    assert isinstance(made, Muon)
    return made


@pytest.mark.parametrize("room", [1, 300, 1 << 18])
@pytest.mark.parametrize(
    "options",
    [{}, {"nesterov": False}, {"momentum": 0.5}, {"momentum": 0.0}, {"ns_steps": 2}],
    ids=lambda options: json.dumps(options),
)
def test_equals_a_loop_over_matrices(
    options: dict[str, Any], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are made orthogonal at a time: one, a few of several parameters, all."""
    monkeypatch.setattr(muon, "CPU_ELEMENTS", room)
    pairs = parameters()
    config = MuonConfig.model_validate(options)
    optimizer = optimizer_of(pairs, muon=config, weight_decay=0.1)
    loop = Loop(pairs, config, 0.03, 0.1)
    set_lr(optimizer, 0.03)
    for number in range(3):
        give_gradients(pairs, number)
        loop.step()
        optimizer.step()
    assert len(loop.members) == 7
    for parameter, values, momenta, _ in loop.members:
        torch.testing.assert_close(parameter.detach(), values, rtol=1e-9, atol=1e-11)
        kept = optimizer.state[parameter]
        assert kept.keys() == {"momentum_buffer"}
        torch.testing.assert_close(kept["momentum_buffer"], momenta, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("number", [1, 3, 4, 100])
def test_no_batch_is_larger_than_there_is_room(number: int) -> None:
    """All are in one batch, in order, and batches are as full as the order allows."""
    members = []
    for count in (2, 7, 1, 1, 4):
        values = torch.rand(count, 2, 3)
        members.append(muon.Matrices(values, values, values, 0.1, 0.0))
    found = list(muon.batches(members, number))
    lengths = [sum(len(piece.values) for piece in batch) for batch in found]
    assert max(lengths) <= number
    together = torch.cat([piece.values for batch in found for piece in batch])
    assert torch.equal(together, torch.cat([each.values for each in members]))
    for length, after in zip(lengths, found[1:], strict=False):
        assert length + len(after[0].values) > number


def test_the_rest_is_adamw_bit_for_bit() -> None:
    """With the same options by role."""
    roles = {"head": {"lr_scale": 0.5, "weight_decay": 0.3}}
    pairs, others = parameters(torch.float32), parameters(torch.float32)
    optimizer = optimizer_of(pairs, roles=roles)
    adamw = build_optimizer(others, OptimConfig.model_validate({"roles": roles}))
    for number in range(2):
        for made, own in ((optimizer, pairs), (adamw, others)):
            set_lr(made, 0.01)
            give_gradients(own, number)
            made.step()
    for (parameter, spec), (other, _) in zip(pairs, others, strict=True):
        assert torch.equal(parameter, other) == (spec.role in (Role.HEAD, Role.GAIN)), spec


def test_options_by_role_apply_to_muon() -> None:
    pairs = parameters()
    roles = {"expert": {"lr_scale": 2.0, "weight_decay": 0.0}}
    optimizer = optimizer_of(pairs, roles=roles, weight_decay=0.2)
    loops = [
        Loop(pairs, MuonConfig(roles=("matrix",)), 0.01, 0.2),
        Loop(pairs, MuonConfig(roles=("expert",)), 0.02, 0.0),
    ]
    set_lr(optimizer, 0.01)
    give_gradients(pairs, 0)
    for loop in loops:
        loop.step()
    optimizer.step()
    for parameter, values, *_ in [member for loop in loops for member in loop.members]:
        torch.testing.assert_close(parameter.detach(), values, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("role", ["matrix", "expert"])
def test_roles_that_are_not_named_stay_with_adamw(role: str) -> None:
    pairs = parameters()
    optimizer = optimizer_of(pairs, muon={"roles": [role]})
    give_gradients(pairs, 0)
    optimizer.step()
    for parameter, spec in pairs:
        assert ("momentum_buffer" in optimizer.state[parameter]) == (spec.role.value == role)
    assert muon_roles(optim_config(muon={"roles": [role]})) == {Role(role)}
    assert muon_roles(OptimConfig()) == frozenset()


def optim_config(**fields: Any) -> OptimConfig:
    return OptimConfig.model_validate(fields)


def torch_pairs() -> tuple[Pairs, list[nn.Parameter]]:
    """Plain matrices, which are all that torch's takes."""
    pairs = [
        (p, s) for p, s in parameters(torch.float32) if s.role is Role.MATRIX and s.stacked == 1
    ]
    return pairs, [nn.Parameter(p.detach().clone()) for p, _ in pairs]


def steps_beside_torch(
    nesterov: bool, dtype: torch.dtype | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """What three steps have added to each matrix, here and by `torch.optim.Muon`."""
    pairs, copies = torch_pairs()
    before = [p.detach().clone() for p in copies]
    optimizer = optimizer_of(pairs, dtype, muon={"nesterov": nesterov}, weight_decay=0.1)
    of_torch = torch.optim.Muon(
        copies, 0.02, 0.1, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )
    set_lr(optimizer, 0.02)
    for number in range(3):
        give_gradients(pairs, number)
        for (parameter, _), copy in zip(pairs, copies, strict=True):
            assert parameter.grad is not None
            copy.grad = parameter.grad.clone()
        optimizer.step()
        of_torch.step()
    for (parameter, _), copy, start in zip(pairs, copies, before, strict=True):
        yield parameter.detach() - start, copy.detach() - start


@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_torch_in_fp32(nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's products are in bf16 whatever the parameters are: here they are kept from it."""
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)
    for got, expected in steps_beside_torch(nesterov, None):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_equals_torch_in_bf16_but_for_rounding() -> None:
    """Torch rounds before it divides by the norm, here after it."""
    for got, expected in steps_beside_torch(True, torch.bfloat16):
        error = (got - expected).norm() / expected.norm()
        assert 0 < error < 0.02


@pytest.mark.parametrize("shape", [(5, 16, 64), (5, 64, 16), (2, 48, 48), (0, 4, 6)])
def test_singular_values_come_near_1(shape: tuple[int, ...]) -> None:
    """Of Gaussian matrices, with the singular vectors they had."""
    given = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = newton_schulz(normalized(given), 5)
    assert made.shape == given.shape
    values = torch.linalg.svdvals(made)
    upper = values[:, : -max(1, shape[1] // 8)]  # of a square matrix the smallest need more steps
    assert ((upper > 0.6) & (upper < 1.25)).all()
    u, _, v = torch.linalg.svd(given, full_matrices=False)
    inner = u.mT @ made @ v.mT
    torch.testing.assert_close(inner, torch.diag_embed(torch.diagonal(inner, dim1=1, dim2=2)))
    many = torch.linalg.svdvals(newton_schulz(normalized(given), 12))
    assert ((many > 0.6) & (many < 1.25)).all()


def test_the_update_is_as_large_as_adamws() -> None:
    """Its root mean square is about 0.2 times the rate, for matrices of every shape."""
    for shape in ((64, 64), (32, 256), (256, 32)):
        pairs: Pairs = [(nn.Parameter(torch.zeros(shape)), ParameterSpec(Role.MATRIX))]
        optimizer = optimizer_of(pairs)
        set_lr(optimizer, 1.0)
        give_gradients(pairs, 0)
        optimizer.step()
        assert 0.16 < float(pairs[0][0].detach().square().mean().sqrt()) < 0.22


def test_gate_and_up_are_two_matrices() -> None:
    """The declared model: what is fed back to the one does not turn the other."""
    decoder = build().decoder
    specs = {name: spec for name, _, spec in named_specs(decoder)}
    name = next(name for name in specs if name.endswith("gate_up"))
    assert specs[name].stacked == 2
    assert all(s.stacked == 1 for n, s in specs.items() if not n.endswith("gate_up"))

    def gate_after(scale: float) -> Tensor:
        parameter = nn.Parameter(decoder.get_parameter(name).detach().clone())
        width = parameter.shape[1] // 2
        pairs = [(parameter, specs[name])]
        optimizer = optimizer_of(pairs)
        give_gradients(pairs, 0)
        assert parameter.grad is not None
        parameter.grad[:, width:] *= scale
        optimizer.step()
        return parameter.detach()[:, :width].clone()

    assert torch.equal(gate_after(1.0), gate_after(5.0))


def test_zeros_only_decay() -> None:
    """An expert that no token came to, from the start."""
    pairs = parameters()
    optimizer = optimizer_of(pairs, weight_decay=0.1)
    set_lr(optimizer, 0.1)
    give_gradients(pairs, 0)
    experts = pairs[list(SHAPES).index("experts")][0]
    assert experts.grad is not None
    experts.grad[1] = 0
    before = experts.detach().clone()
    optimizer.step()
    torch.testing.assert_close(experts.detach()[1], before[1] * (1 - 0.1 * 0.1))
    assert not torch.allclose(experts.detach()[0], before[0] * (1 - 0.1 * 0.1))


def test_a_gradient_that_has_ended_moves_matrices_on_until_its_mean_is_tiny() -> None:
    pairs = parameters()
    optimizer = optimizer_of(pairs, weight_decay=0.0, muon={"momentum": 0.9})
    set_lr(optimizer, 1.0)
    give_gradients(pairs, 0)
    optimizer.step()
    parameter = pairs[0][0]
    lengths = []
    for _ in range(400):
        for p, _ in pairs:
            p.grad = torch.zeros_like(p)
        before = parameter.detach().clone()
        optimizer.step()
        lengths.append(float((parameter.detach() - before).norm()))
    assert lengths[50] == pytest.approx(lengths[0], rel=1e-6)
    assert lengths[-1] < 1e-6 * lengths[0]


def test_a_parameter_without_a_gradient_stays() -> None:
    pairs = parameters()
    optimizer = optimizer_of(pairs)
    give_gradients(pairs, 0)
    pairs[0][0].grad = None
    before = [p.detach().clone() for p, _ in pairs]
    optimizer.step()
    same = [torch.equal(p, b) for (p, _), b in zip(pairs, before, strict=True)]
    assert same == [True] + [False] * (len(pairs) - 1)


def test_what_is_no_matrix_is_refused() -> None:
    pairs: Pairs = [(nn.Parameter(torch.zeros(3)), ParameterSpec(Role.MATRIX))]
    with pytest.raises(ValueError, match=r"no matrices: \[3\]"):
        optimizer_of(pairs)


# In an engine


def muon_layout(
    name: str, options: dict[str, Any], muon_options: dict[str, Any] | None = None
) -> Layout:
    """A model in training with Muon in fp64, from initial values."""
    config = OptimConfig.model_validate({"lr": 1e-2, "muon": muon_options or {}})
    return Layout(
        decoder_of(name, torch.float64),
        ParallelConfig.model_validate(options),
        partial(build_optimizer, config=config),
        LENGTH,
        whole=muon_roles(config),
    )


def step(layout: Layout, number: int, sound: bool = True) -> float:
    """A step on the rows of that number; its loss."""
    batch = Rows(**vars(documents(4)))
    batch.tokens_BS.copy_(batch.tokens_BS.roll(number, 1))
    parts = [batch.rows(*part) for part in layout.row_ranges(4, 1)]
    context = StepContext("topk", Ledger(), step=number, seed=7, training=True)
    result = layout.accumulate_gradients(parts, batch.labels_BS.numel(), context)
    layout.engine.step(1.0, torch.tensor(sound))
    layout.decoder.update_routers(result.ledger, number)
    return float(result.losses["loss"])


@pytest.mark.parametrize("fault", ["unsound", "nan"])
def test_a_step_that_is_left_out_changes_nothing(fault: str) -> None:
    """Decided on the device; the next one is as if it had not been."""
    layout, other = muon_layout("moepp", {}), muon_layout("moepp", {})
    for each in (layout, other):
        step(each, 0)
    if fault == "unsound":
        step(layout, 1, sound=False)
    else:
        for p in layout.decoder.parameters():
            p.grad = torch.full_like(p, float("nan"))
        layout.engine.step(1.0)
    for each in (layout, other):
        step(each, 2)
    for (name, part), expected in zip(
        layout.engine.parts().items(), other.engine.parts().values(), strict=True
    ):
        assert torch.equal(part.local, expected.local), name


MODEL = "moepp_mor"
CONFIG = OptimConfig.model_validate({"lr": 0.05, "muon": {}})
EXPERTS = OptimConfig.model_validate({"lr": 0.05, "muon": {"roles": ["expert"]}})
SLOW = {
    "ddp": CONFIG,
    "ep-accumulate": CONFIG,
    "zero1": CONFIG,
    "zero1-uneven": CONFIG,
    "ep4-empty": CONFIG,
    "1f1b": CONFIG,
    "pp-zero1": CONFIG,
    "pp-ep": CONFIG,
    "cp": CONFIG,
    "fsdp2": EXPERTS,
    "hsdp": EXPERTS,
    "fsdp2-ep": EXPERTS,
    "sp": EXPERTS,
    "rp": CONFIG,
    "rp-zero1": CONFIG,
}
CASES: dict[str, Case] = {
    **{name: LAYOUTS[name] for name in SLOW if name in LAYOUTS},
    "rp": Case(2, {"rp": 2, "data": "ddp"}, micro_batch=1),
    "rp-zero1": Case(4, {"rp": 2, "data": "zero1"}, micro_batch=1),
}


def trained(name: str, case: Case, config: OptimConfig) -> dict[str, Any]:
    make = partial(build_optimizer, config=config)
    return train(name, case, make=make, in_one_piece=muon_roles(config))


def check(case: Case, config: OptimConfig, name: str = MODEL) -> None:
    """All processes of a layout against one: losses, updates, momenta."""
    alone = Case(rows=case.rows, micro_batch=case.rows, clips=case.clips)
    (expected,) = run_forked(1, trained, name, alone, config)
    assert any("momentum_buffer" in key for key in expected)
    for got in run_forked(case.processes, trained, name, case, config):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            scale = max(float(np.abs(value).max(initial=0.0)), 1e-6)
            assert float(np.abs(got[key] - value).max(initial=0.0)) <= 1e-7 * scale, key


@pytest.mark.usefixtures("warm")
def test_data_and_expert_parallelism_equal_one_process() -> None:
    """Matrices are shared out by ZeRO, experts are on one process each."""
    check(LAYOUTS["ep"], CONFIG)


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("layout", SLOW)
def test_layouts_equal_one_process(layout: str) -> None:
    check(CASES[layout], SLOW[layout])


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("name", ["bdh", "mixed", "mixture", "lora"])
def test_other_matrices_equal_one_process(name: str) -> None:
    """Heads, experts of low rank, attention experts."""
    check(LAYOUTS["zero1"], CONFIG, name)


def drifting(options: dict[str, Any]) -> int:
    """How many matrices copies agree on, though each process's step errs in its own way."""
    layout = muon_layout(MODEL, options)
    made = layout.engine.optimizer
    assert isinstance(made, Muon)
    update = made._update

    def err(batch: Sequence[muon.Matrices], applied: Tensor | None) -> None:
        update(batch, applied)
        for matrices in batch:
            matrices.values.add_(1e-3 * layout.mesh.rank)

    made._update = err  # type: ignore[method-assign]
    step(layout, 0)
    assert whole_tensors(layout.parts()), "which compares what several have"
    return sum(p.placement.tied is not None and p.parameter.dim() > 1 for p in placed_by(layout))


def placed_by(layout: Layout) -> Sequence[Placed]:
    assert isinstance(layout.engine, ReplicatedEngine | ZeroEngine)
    return layout.engine.placed


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(
    "options", [{"pp": 2, "data": "ddp"}, {"pp": 2}, {"rp": 2}], ids=lambda options: str(options)
)
def test_copies_on_several_stages_stay_alike(options: dict[str, Any]) -> None:
    """A product in a batch of another size may be rounded differently."""
    assert all(run_forked(2, drifting, options))


def unused(options: dict[str, Any]) -> list[bool]:
    """Whether a matrix that no process has used stays, and another one, in a second step."""
    layout = muon_layout("dense", options)
    step(layout, 0)
    pair = [layout.decoder.get_parameter(f"layers.{n}.attention.q.weight") for n in (1, 2)]
    before = [p.detach().clone() for p in pair]
    batch = Rows(**vars(documents(4)))
    parts = [batch.rows(*part) for part in layout.row_ranges(4, 4)]
    context = StepContext("topk", Ledger(), training=True)
    layout.accumulate_gradients(parts, batch.labels_BS.numel(), context)
    pair[0].grad = None
    layout.engine.step(1.0)
    return [torch.equal(p, b) for p, b in zip(pair, before, strict=True)]


@pytest.mark.usefixtures("warm")
def test_zero1_leaves_what_nobody_used() -> None:
    assert run_forked(2, unused, {"data": "zero1"}) == [[True, False]] * 2


def held(options: dict[str, Any]) -> tuple[int, int]:
    """Elements of momenta of matrices here, and whether the first is whole: its dimensions."""
    layout = muon_layout("dense", options)
    state = layout.engine.optimizer.state.values()
    momenta = [s["momentum_buffer"] for s in state if "momentum_buffer" in s]
    return sum(m.numel() for m in momenta), len(momenta)


@pytest.mark.usefixtures("warm")
def test_zero1_shares_out_the_momenta() -> None:
    shares = run_forked(4, held, {"data": "zero1"})
    ((whole, number),) = run_forked(1, held, {})
    assert sum(elements for elements, _ in shares) == whole
    assert max(elements for elements, _ in shares) < 1.2 * whole / 4
    assert sum(count for _, count in shares) == number  # no matrix is cut


def test_matrices_are_shared_out_evenly() -> None:
    """Every one once, the loads within one matrix of each other."""
    entries, sizes = [8, 1, 1, 5], [30, 100, 7, 20]
    for number in (1, 2, 3, 7):
        counts = share_out(entries, sizes, number)
        assert [sum(of_one) for of_one in counts] == entries
        loads = [
            sum(n[rank] * size for n, size in zip(counts, sizes, strict=True))
            for rank in range(number)
        ]
        assert sum(loads) == 8 * 30 + 100 + 7 + 5 * 20
        assert max(loads) - min(loads) <= 100


# Checkpoints and configs


def saved(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The state after two steps, of which a checkpoint is made."""
    layout = muon_layout("moepp", options)
    for number in range(2):
        step(layout, number)
    saver = Saver(LocalStorage(folder), CheckpointConfig())
    saver.begin(record(2), layout.parts())
    saver.settle()
    return {name: value.numpy() for name, value in whole_tensors(layout.parts()).items()}


def loaded(options: dict[str, Any], folders: Sequence[Path]) -> list[tuple[dict[str, Any], float]]:
    """What each checkpoint has brought, and the loss of the step after the next."""
    layout = muon_layout("moepp", options)
    found = []
    for folder in folders:
        checkpoint, _ = newest_sound(LocalStorage(folder), [2])
        assert checkpoint is not None
        parts = layout.parts()
        fill(checkpoint, parts)
        layout.engine.take_over(parts)
        state = {name: value.numpy() for name, value in whole_tensors(layout.parts()).items()}
        step(layout, 2)
        found.append((state, step(layout, 3)))
    return found


RELAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "zero1, ep": (2, {"data": "zero1", "ep": 2}),
    "pp": (2, {"pp": 2}),
}


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_layouts_load_each_other(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in RELAYOUTS]
    states = [
        run_forked(count, saved, options, folder)[0]
        for (count, options), folder in zip(RELAYOUTS.values(), folders, strict=True)
    ]
    losses = []
    for name, (count, options) in RELAYOUTS.items():
        for found in run_forked(count, loaded, options, folders):
            for expected, (state, loss) in zip(states, found, strict=True):
                assert state.keys() == expected.keys()
                assert all(np.array_equal(state[key], expected[key]) for key in state), name
                losses.append(loss)
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-9)


def test_a_resumed_run_is_the_unbroken_one(run_tree: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit, stopped after any step."""
    expected = train_run(small_run(run_tree, tmp_path / "whole"))
    config = small_run(run_tree, tmp_path / "stopped")
    for number in (1, 2, 3):
        resumed = train_run(config, stop_after=number)
    assert logged(resumed.folder) == logged(expected.folder)
    states = saved_state(expected), saved_state(resumed)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    kept = {name.rpartition("/")[2] for name in states[0] if name.startswith("optimizer/")}
    assert kept == {"momentum_buffer", "step", "exp_avg", "exp_avg_sq"}


def small_run(tree: dict[str, Any], folder: Path, **optim: Any) -> RunConfig:
    """Three steps of a model of two layers, with Muon or what `optim` says."""
    return RunConfig.model_validate(
        tree
        | {
            "run_dir": str(folder),
            "model": model_tree(depth={"num_layers": 2}),
            "train": tree["train"] | {"num_steps": 3, "micro_batch_size": 4},
            "optim": tree["optim"] | {"muon": {}} | optim,
        }
    )


@pytest.mark.parametrize("first", ["adamw", "muon"])
def test_a_checkpoint_of_the_other_optimizer_is_refused(
    run_tree: dict[str, Any], tmp_path: Path, first: str
) -> None:
    configs = [small_run(run_tree, tmp_path, muon=node) for node in (None, {})]
    before, after = configs if first == "adamw" else configs[::-1]
    run = train_run(before, stop_after=1)
    (run.folder / "config.yaml").unlink()
    with pytest.raises(
        CheckpointError, match=r"belongs to another config \(.*optim\.muon"
    ) as caught:
        train_run(after)
    assert "\n" not in str(caught.value)
    other = Run(after, open_corpora(after.data), [])
    with pytest.raises(CheckpointError, match=r"is not in the (checkpoint|model)") as caught:
        resume(other, allow_changes=True)
    assert "\n" not in str(caught.value)


def test_the_example_of_the_documents_is_valid(run_tree: dict[str, Any]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "design.md").read_text()
    (fragment,) = re.findall(r"```yaml\n(optim:.*?)```", text, re.DOTALL)
    optim = run_tree["optim"] | yaml.safe_load(fragment)["optim"]
    config = RunConfig.model_validate(run_tree | {"optim": optim})
    assert config.optim.muon == MuonConfig()
    assert not list(problems(config))


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "tp": ({}, {"tp": 2}, "parallel.tp: 2 cuts matrices, and optim.muon needs whole ones"),
    "etp": ({}, {"etp": 2}, "parallel.etp: 2 cuts the matrices of experts, and optim.muon needs"),
    "fsdp2": ({}, {"data": "fsdp2"}, "parallel.data: fsdp2 cuts the rows of matrices"),
    "deepspeed": (
        {"roles": ["expert"]},
        {"engine": "deepspeed"},
        "parallel.engine: deepspeed flattens and cuts what it updates",
    ),
}
LEGAL: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({}, {"data": "ddp", "ep": 2}),
    ({}, {"ep": 2, "cp": 2}),
    ({}, {"rp": 2}),
    ({}, {"pp": 2}),
    ({"roles": ["expert"]}, {"tp": 2}),
    ({"roles": ["expert"]}, {"data": "fsdp2", "ep": 2}),
    ({"roles": ["matrix"]}, {"etp": 2}),
]


def found_problems(
    tree: dict[str, Any], muon_options: dict[str, Any] | None, parallel: dict[str, Any]
) -> list[str]:
    optim = tree["optim"] | {"muon": muon_options}
    config = RunConfig.model_validate(tree | {"optim": optim, "parallel": parallel})
    return [f"{path}: {message}" for path, message in problems(config)]


@pytest.mark.parametrize("name", REFUSED)
def test_layouts_that_cut_matrices_are_refused(name: str, run_tree: dict[str, Any]) -> None:
    muon_options, parallel, expected = REFUSED[name]
    found = found_problems(run_tree, muon_options, parallel)
    assert len(found) == 1
    assert found[0].startswith(expected)
    assert found_problems(run_tree, None, parallel) == []


@pytest.mark.parametrize(("muon_options", "parallel"), LEGAL)
def test_layouts_that_do_not_are_legal(
    muon_options: dict[str, Any], parallel: dict[str, Any], run_tree: dict[str, Any]
) -> None:
    assert found_problems(run_tree, muon_options, parallel) == []
