"""`engine: deepspeed`: DeepSpeed's ZeRO and optimizer offload under our layers.

ZeRO (Rajbhandari et al. 2019, arXiv 1910.02054) and ZeRO-Offload (Ren et al. 2021, arXiv
2101.06840) share out what data-parallel processes hold alike. DeepSpeed sees the own parts of all
weights as one module and knows nothing of how they were cut, nor of what is in a micro-batch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moebius.errors import CheckpointError, LayoutError
from moebius.model.decoder import Decoder
from moebius.model.parameters import Role
from moebius.parallel.comm import Group
from moebius.parallel.config import DeepSpeedConfig
from moebius.parallel.deepspeed_rules import CLIPPED_APART
from moebius.parallel.engine import MOMENTS, Holding, MakeOptimizer, square, sum_gradients
from moebius.parallel.mesh import Mesh
from moebius.parallel.part import Part, Parts
from moebius.parallel.place import Placed

T = TypeVar("T")
MASTERS = "single_partition_of_fp32_groups"


def _nothing() -> None:
    """Between calls, so that no activations are kept."""


class Root(nn.Module):
    """What DeepSpeed takes for the model: any function of the decoder's weights."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.function: Callable[[], Tensor | None] = _nothing

    def forward(self) -> Tensor | None:
        """The function's value."""
        return self.function()


class DeepSpeedEngine:
    """ZeRO of DeepSpeed over the data-parallel processes, see `engine.Engine`; it always steps.

    `differentiate` takes the place of an executor's own; what else reads weights, as evaluation
    does, has to run in `compute`.
    """

    def __init__(
        self,
        decoder: Decoder,
        placed: Sequence[Placed],
        mesh: Mesh,
        make: MakeOptimizer,
        config: DeepSpeedConfig,
    ) -> None:
        self.skips = False
        self.squares: dict[str, Tensor] | None = None
        self.deepspeed = import_deepspeed(placed[0].parameter.device)
        check_parameters(placed)
        self.placed = placed
        self.mesh = mesh
        self.stage = config.stage
        self.trained = [p for p in placed if p.spec.role is not Role.FROZEN]
        self.partial = partial_gradients(self.trained, mesh)
        if self.stage == 3:
            hide_empty(decoder)
            self.trained = [p for p in self.trained if p.parameter.numel()]
        self.optimizer = make((p.parameter, p.spec) for p in self.trained)
        self.root = Root(decoder)
        note_copies(placed, mesh)
        self.engine = self.deepspeed.initialize(
            model=self.root,
            optimizer=self.optimizer,
            mpu=axes_of(mesh) if mesh.tp.size > 1 else None,
            config=settings(config),
        )[0]
        if self.stage > 1:
            self._register_hooks()
        if isinstance(self.optimizer, torch.optim.AdamW):
            self._make_state(0.0)

    def _register_hooks(self) -> None:
        """Make gradients what DeepSpeed is to reduce, before it does within the backward pass."""
        for group, members in self.partial.items():
            for p in members:
                p.parameter.register_hook(_sum_over(group))
        for p in self.trained if self.stage == 3 else ():
            p.parameter.register_hook(_multiply(self.mesh.data.size))

    def differentiate(self, loss: Callable[[], Tensor]) -> None:
        """Run a micro-batch forwards and backwards; every process has to run equally many."""
        self.engine.backward(self._forward(loss), scale_wrt_gas=False)

    def compute(self, function: Callable[[], T]) -> T:
        """The value of a function of the weights, without gradients; a collective call."""
        found: list[T] = []
        with torch.no_grad():
            self._forward(lambda: found.append(function()))
        return found[0]

    def _forward(self, function: Callable[[], Tensor | None]) -> Any:
        self.root.function = function
        try:
            return self.engine()
        finally:
            self.root.function = _nothing

    def step(self, clip_norm: float, sound: Tensor | None = None) -> Tensor:
        """See `Engine`."""
        if self.stage == 1:
            self._complete_gradients()
        self.engine.optimizer.clip_grad = clip_norm
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(norm, device=self.placed[0].parameter.device)

    def weight_square(self) -> Tensor:
        """See `Engine`."""
        return square(self._holdings(), self.mesh)

    def _holdings(self) -> Iterable[Holding]:
        """Of stage 3 the own share of each parameter's fp32 copy, which zeros fill up."""
        shares = self.mesh.data.size if self.stage == 3 else 1
        for p in self.trained:
            replicas = p.placement.replicas(self.mesh.world.size) // shares
            value = p.parameter.detach()
            if self.stage == 3:
                value = self.deepspeed.utils.safe_get_local_fp32_param(p.parameter)
            yield Holding(p.name, value, None, p.spec.role, replicas)

    @torch.no_grad()
    def _complete_gradients(self) -> None:
        """Add up what tensor parallelism has left partial, and give every parameter a gradient: it
        counts calls of the data-parallel processes, which must be alike."""
        for p in self.trained:
            if p.parameter.grad is None:
                p.parameter.grad = torch.zeros_like(p.parameter)
        for group, members in self.partial.items():
            sum_gradients(group, [p.parameter for p in members])

    def parts(self) -> dict[str, Part]:
        """See `Engine`; of copies, which `take_over` brings back."""
        copies = {f"model/{p.name}": self._parameter(p) for p in self.placed}
        for p in self.trained:
            for key, value in self._state(p).items():
                copies[f"optimizer/{p.name}/{key}"] = value
        cuts = {p.name: p.placement.cuts for p in self.placed}
        return {
            name: Part.of(value, cuts[_parameter_of(name)] if value.dim() else ())
            for name, value in copies.items()
        }

    def _parameter(self, p: Placed) -> Tensor:
        with self._whole(p):
            return p.parameter.detach().clone()

    def _state(self, p: Placed) -> dict[str, Tensor]:
        """DeepSpeed counts the steps of all parameters as one."""
        state: dict[str, Tensor] = next(iter(self.optimizer.state.values()), {})
        read = self.deepspeed.utils.safe_get_full_optimizer_state
        return {
            key: read(p.parameter, key).clone() if value.dim() else value.cpu().clone()
            for key, value in state.items()
        }

    def _whole(self, p: Placed, modifier: int | None = None) -> Any:
        """A context in which a parameter is not shared out."""
        return self.deepspeed.zero.GatheredParameters([p.parameter], modifier_rank=modifier)

    @torch.no_grad()
    def take_over(self, parts: Parts) -> None:
        """See `Engine`. Raises CheckpointError where parameters took differently many steps."""
        copies = {name: part.local for name, part in parts.items()}
        steps = {float(t) for name, t in copies.items() if name.endswith("/step")}
        if len(steps) > 1:
            raise CheckpointError(
                "the optimizer's state has parameters that took differently many steps, which "
                "DeepSpeed cannot",
                "go on with parallel.engine=native",
            )
        for p in self.placed:
            with self._whole(p, 0):
                p.parameter.copy_(copies[f"model/{p.name}"])
        for p in self.trained:
            self._set_part(p, copies[f"model/{p.name}"], None)
        if steps:
            self._make_state(steps.pop())
            for p in self.trained:
                for key in MOMENTS:
                    self._set_part(p, copies[f"optimizer/{p.name}/{key}"], key)

    def _make_state(self, step: float) -> None:
        """State of zeros for the flat tensors that DeepSpeed's optimizer works on."""
        zero = self.engine.optimizer
        name = "fp32_partitioned_groups_flat" if self.stage == 3 else MASTERS
        fused = any(group.get("fused") for group in self.optimizer.param_groups)
        for flat in getattr(zero, name):
            count = torch.tensor(step, device=flat.device if fused else None)
            moments = {key: torch.zeros_like(flat) for key in MOMENTS}
            self.optimizer.state[flat] = {"step": count, **moments}
        self._link_state()

    def _link_state(self) -> None:
        """Let DeepSpeed find the state by parameter. It does so by itself once, and too early: when
        the first of several groups has made its step."""
        zero, link = self.engine.optimizer, self.deepspeed.utils.lazy_init_hp_params_optimizer_state
        if self.stage < 3:
            for group in zip(zero.bit16_groups, getattr(zero, MASTERS), strict=True):
                link(*group, self.optimizer.state)

    def _set_part(self, p: Placed, part: Tensor, key: str | None) -> None:
        """Set this process's share of a parameter's fp32 copy, or of its state."""
        utils = self.deepspeed.utils
        kind = "full"
        if self.stage == 3:
            # What it offers for whole tensors fails where they do not divide evenly.
            kind, part = "local", _share(part, self.mesh.data)
        if key is None:
            getattr(utils, f"safe_set_{kind}_fp32_param")(p.parameter, part)
        else:
            getattr(utils, f"safe_set_{kind}_optimizer_state")(p.parameter, part, key)


def _parameter_of(name: str) -> str:
    """The parameter of a part's name."""
    kind, _, rest = name.partition("/")
    return rest if kind == "model" else rest.rpartition("/")[0]


def axes_of(mesh: Mesh) -> SimpleNamespace:
    """The mesh as DeepSpeed asks for it (its `mpu`)."""
    data_group = mesh.data.process_group
    if data_group is None:  # this process alone, where None would mean all
        alone = [[rank] for rank in range(mesh.world_size)]
        data_group, _ = dist.new_subgroups_by_enumeration(alone)
    answers: dict[str, Any] = {"get_data_parallel_group_ranks": list(mesh.data.ranks)}
    for axis, group, process_group in (
        ("data_parallel", mesh.data, data_group),
        ("model_parallel", mesh.tp, mesh.tp.process_group),
        ("tensor_model_parallel", mesh.tp, mesh.tp.process_group),
    ):
        answers[f"get_{axis}_group"] = process_group
        answers[f"get_{axis}_rank"] = group.rank
        answers[f"get_{axis}_world_size"] = group.size
    return SimpleNamespace(**{name: partial(_answer, value) for name, value in answers.items()})


def _answer(value: Any) -> Any:
    return value


def settings(config: DeepSpeedConfig) -> dict[str, Any]:
    """DeepSpeed's own configuration."""
    zero: dict[str, Any] = {
        "stage": config.stage,
        # With stage 1 gradients stay where they arise until the step, and need no hooks.
        "contiguous_gradients": config.stage > 1,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        # It multiplies these for its reports and does nothing else with them here.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # However many micro-batches there are, `step` ends them.
        "managed_gradient_accumulation": False,
        "gradient_allreduce_op": "mean" if config.stage == 3 else "sum",
        "gradient_clipping": 1.0,  # `step` sets its own
        "zero_optimization": zero,
        # The optimizer is PyTorch's; DeepSpeed's own for the host would have to be compiled.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def import_deepspeed(device: torch.device) -> Any:
    """The package. Raises LayoutError where it cannot be had."""
    if not dist.is_initialized():
        raise LayoutError(
            "parallel.engine: deepspeed needs processes that a launcher started",
            "torchrun --nproc-per-node 1 for one",
        )
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        deepspeed = import_module("deepspeed")
    except ImportError as error:
        raise LayoutError(
            f"parallel.engine: deepspeed cannot be imported ({error})",
            "pip install 'moebius[deepspeed]'",
        ) from None
    # It warns that optimizers other than its own are untested: with it, that is.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Collectives through shared memory, for CPUs alone, would have to be compiled first.
    import_module("deepspeed.comm.torch").build_shm_op = _nothing  # type: ignore[attr-defined]
    return deepspeed


def check_parameters(placed: Sequence[Placed]) -> None:
    """Raise LayoutError for what `deepspeed_problems` refuses and would be wrong without a sign."""
    for p in placed:
        if p.spec.role is Role.AUX_ROUTER:
            raise LayoutError(f"parallel.engine: deepspeed, but {p.name} {CLIPPED_APART}")
        if p.placement.tied is not None:
            raise LayoutError(f"parallel.engine: deepspeed, but pipeline stages share {p.name}")


def hide_empty(decoder: Decoder) -> None:
    """Make parameters without elements plain attributes: stage 3 waits for them in vain."""
    for module in decoder.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.numel() == 0:
                delattr(module, name)
                module.__dict__[name] = parameter


def note_copies(placed: Sequence[Placed], mesh: Mesh) -> None:
    """Tell DeepSpeed which parameters count in the gradient's norm on every process along `tp`; of
    the others only the first process's do."""
    for p in placed:
        counts = [cut.copies for cut in p.placement.cuts]
        p.parameter.model_parallel = any(mesh.tp.rank % n == 0 for n in counts)  # type: ignore[attr-defined]


def partial_gradients(placed: Sequence[Placed], mesh: Mesh) -> dict[Group, list[Placed]]:
    """Parameters whose gradients must be added up along `tp` before the data-parallel processes
    add them, by the processes that do. Raises LayoutError where it takes other processes."""
    groups: dict[int, Group | None] = {**mesh.neighbours, 1: None, mesh.tp.size: mesh.tp}
    found: dict[Group, list[Placed]] = {}
    for p in placed:
        ranks = set(p.placement.reduce.ranks)
        group = groups.get(len(ranks) // mesh.data.size)
        own = {mesh.rank} if group is None else set(group.ranks)
        if not ranks.issuperset(mesh.data.ranks) or ranks.intersection(mesh.tp.ranks) - own:
            raise LayoutError(f"parallel.engine: deepspeed, but other processes reduce {p.name}")
        if group is not None:
            found.setdefault(group, []).append(p)
    return found


def _sum_over(group: Group) -> Callable[[Tensor], Tensor]:
    return lambda gradient: group.all_reduce(gradient.clone())


def _multiply(number: int) -> Callable[[Tensor], Tensor]:
    """For stage 3, which can only average. Scaling the loss would miss the auxiliary losses, whose
    gradients do not depend on it."""
    return lambda gradient: gradient * number


def _share(whole: Tensor, group: Group) -> Tensor:
    """This process's of equal shares of a flattened tensor, which zeros fill up."""
    size = -(-whole.numel() // group.size)
    flat = whole.new_zeros(size * group.size)
    flat[: whole.numel()] = whole.flatten()
    return flat[group.rank * size : (group.rank + 1) * size]
