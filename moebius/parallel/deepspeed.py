"""`engine: deepspeed`: DeepSpeed's ZeRO and optimizer offload under our layers.

ZeRO (Rajbhandari et al. 2019, arXiv 1910.02054) and ZeRO-Offload (Ren et al. 2021, arXiv
2101.06840) share out what data-parallel processes hold alike. DeepSpeed sees the own parts of all
weights as one module and knows nothing of how they were cut, nor of what is in a micro-batch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moebius.config import Problem
from moebius.errors import CheckpointError, LayoutError
from moebius.model.config import ModelConfig
from moebius.model.decoder import Decoder
from moebius.model.parameters import Role
from moebius.parallel.comm import Group
from moebius.parallel.config import DeepSpeedConfig, ParallelConfig
from moebius.parallel.engine import MakeOptimizer, sum_gradients
from moebius.parallel.mesh import Mesh, partition
from moebius.parallel.place import Placed

LARGEST = 1e9
"""a clipping norm that is none; DeepSpeed fixes at the start whether it clips"""


class Root(nn.Module):
    """What DeepSpeed takes for the model: any function of the decoder's weights."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.function: Callable[[], Any] | None = None

    def forward(self) -> Any:
        """The function's value."""
        assert self.function is not None
        return self.function()


class DeepSpeedEngine:
    """ZeRO of DeepSpeed over the data-parallel processes, see `engine.Engine`.

    `differentiate` takes the place of an executor's own; what reads weights in any other way than
    this or `model_tensors` has to run in `whole_weights`.
    """

    def __init__(
        self,
        decoder: Decoder,
        placed: Sequence[Placed],
        mesh: Mesh,
        make: MakeOptimizer,
        config: DeepSpeedConfig,
    ) -> None:
        self.placed = placed
        self.mesh = mesh
        self.stage = config.stage
        self.trained = [p for p in placed if p.spec.role is not Role.FROZEN]
        self.partial = partial_gradients(self.trained, mesh)
        self.optimizer = make((p.parameter, p.spec) for p in placed)
        self.root = Root(decoder)
        self.deepspeed = import_deepspeed(placed[0].parameter.device)
        note_copies(placed, mesh)
        self.engine = self.deepspeed.initialize(
            model=self.root,
            optimizer=self.optimizer,
            mpu=Axes(mesh) if mesh.tp.size > 1 else None,
            config=settings(config),
            dist_init_required=False if self.deepspeed.comm.is_initialized() else None,
        )[0]
        if self.stage > 1:
            for group, members in self.partial.items():
                for p in members:
                    p.parameter.register_hook(_sum_over(group))
        if self.stage == 3:
            for p in self.trained:
                p.parameter.register_hook(_multiply(mesh.data.size))

    def differentiate(self, loss: Callable[[], Tensor]) -> None:
        """Run a micro-batch forwards and backwards; every process has to run equally many."""
        self.root.function = loss
        value = self.engine()
        self.root.function = None
        self.engine.backward(value, scale_wrt_gas=False)

    def step(self, clip_norm: float) -> Tensor:
        """See `Engine`."""
        if self.stage == 1:
            self._complete_gradients()
        self.engine.optimizer.clip_grad = clip_norm
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(norm, device=self.placed[0].parameter.device)

    @torch.no_grad()
    def _complete_gradients(self) -> None:
        """Add up what tensor parallelism has left partial, and give every parameter a gradient: it
        counts calls of the data-parallel processes, which must be alike."""
        for p in self.trained:
            if p.parameter.grad is None:
                p.parameter.grad = torch.zeros_like(p.parameter)
        for group, members in self.partial.items():
            sum_gradients(group, [p.parameter for p in members])

    @contextmanager
    def whole_weights(self, placed: Sequence[Placed] | None = None) -> Iterator[None]:
        """With stage 3 parameters are whole only in here; what is done to them is lost."""
        parameters = [p.parameter for p in placed or self.placed]
        with self.deepspeed.zero.GatheredParameters(parameters, enabled=self.stage == 3):
            yield

    def model_tensors(self) -> dict[str, Tensor]:
        """See `Engine`."""
        found = {}
        for p in self.placed:
            with self.whole_weights([p]):
                found[p.name] = p.placement.join(p.parameter.detach()).clone()
        return found

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """See `Engine`. DeepSpeed counts the steps of all parameters as one."""
        state = next(iter(self.optimizer.state.values()), {})
        found: dict[str, Tensor] = {}
        for p in self.trained if state else ():
            for key, value in state.items():
                if value.dim() == 0:
                    found[f"{p.name}/{key}"] = value.cpu().clone()
                    continue
                whole = self.deepspeed.utils.safe_get_full_optimizer_state(p.parameter, key)
                found[f"{p.name}/{key}"] = p.placement.join(whole)
        return found

    @torch.no_grad()
    def load_model(self, tensors: dict[str, Tensor]) -> None:
        """See `Engine`."""
        for p in self.placed:
            part = p.placement.take(tensors[p.name]).to(p.parameter.device)
            if self.stage < 3:
                p.parameter.copy_(part)
            else:
                with self.deepspeed.zero.GatheredParameters([p.parameter], modifier_rank=0):
                    p.parameter.copy_(part)
            if p.parameter.requires_grad:
                self._set_part(p, part, None)

    @torch.no_grad()
    def load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        """See `Engine`. Raises CheckpointError where parameters took differently many steps."""
        steps = {float(t) for path, t in tensors.items() if path.endswith("/step")}
        if not steps:
            return
        if len(steps) > 1:
            raise CheckpointError(
                "the optimizer's state has parameters that took differently many steps, which "
                "DeepSpeed cannot",
                "go on with parallel.engine=native",
            )
        paths = [path for path in tensors if not path.endswith("/step")]
        keys = sorted({path.rpartition("/")[2] for path in paths})
        self._make_state(steps.pop(), keys)
        for p in self.trained:
            for key in keys:
                whole = tensors.get(f"{p.name}/{key}")
                if whole is not None:
                    self._set_part(p, p.placement.take(whole), key)

    def _make_state(self, step: float, keys: Sequence[str]) -> None:
        """State of zeros for the flat tensors that DeepSpeed's optimizer works on."""
        zero = self.engine.optimizer
        flat_tensors = (
            zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else zero.single_partition_of_fp32_groups
        )
        for flat in flat_tensors:
            state: dict[str, Tensor] = {key: torch.zeros_like(flat) for key in keys}
            fused = any(group.get("fused") for group in self.optimizer.param_groups)
            state["step"] = torch.tensor(step, device=flat.device if fused else None)
            self.optimizer.state[flat] = state
        if self.stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def _set_part(self, p: Placed, part: Tensor, key: str | None) -> None:
        """Set this process's share of a parameter's fp32 copy, or of its state."""
        utils = self.deepspeed.utils
        if self.stage == 3:
            # What it offers for whole tensors fails where they do not divide evenly.
            part = _share(part, self.mesh.data)
            if key is None:
                utils.safe_set_local_fp32_param(p.parameter, part)
            else:
                utils.safe_set_local_optimizer_state(p.parameter, part, key)
        elif key is None:
            utils.safe_set_full_fp32_param(p.parameter, part)
        else:
            utils.safe_set_full_optimizer_state(p.parameter, part, key)


class Axes:
    """The mesh as DeepSpeed asks for it (its `mpu`)."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.data_group = mesh.data.process_group
        if self.data_group is None:  # this process alone, where None would mean all
            alone = [[rank] for rank in range(mesh.world_size)]
            self.data_group, _ = dist.new_subgroups_by_enumeration(alone)

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """Processes that hold the same."""
        return self.data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their ranks."""
        return list(self.mesh.data.ranks)

    def get_data_parallel_rank(self) -> int:
        """The own number among them."""
        return self.mesh.data.rank

    def get_data_parallel_world_size(self) -> int:
        """How many they are."""
        return self.mesh.data.size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """Processes that hold different parts."""
        return self.mesh.tp.process_group

    def get_model_parallel_rank(self) -> int:
        """The own number among them."""
        return self.mesh.tp.rank

    def get_model_parallel_world_size(self) -> int:
        """How many they are."""
        return self.mesh.tp.size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


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
        "gradient_clipping": LARGEST,
        "zero_optimization": zero,
        # The optimizer is PyTorch's; DeepSpeed's own for the host would have to be compiled.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def import_deepspeed(device: torch.device) -> Any:
    """The package. Raises LayoutError where it is missing."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed
    except ImportError:
        raise LayoutError(
            "parallel.engine: deepspeed is not installed", "pip install 'moebius[deepspeed]'"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Collectives through shared memory, for CPUs alone, would have to be compiled first.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def note_copies(placed: Sequence[Placed], mesh: Mesh) -> None:
    """Tell DeepSpeed which parameters count in the gradient's norm on every process along `tp`; of
    the others only the first process's do."""
    for p in placed:
        counts = [cut.copies for cut in p.placement.cuts]
        p.parameter.model_parallel = any(mesh.tp.rank % n == 0 for n in counts)  # type: ignore[attr-defined]


def partial_gradients(placed: Sequence[Placed], mesh: Mesh) -> dict[Group, list[Placed]]:
    """Parameters whose gradients must be added up along `tp` before the data-parallel processes
    add them, by the processes that do."""
    neighbours = {1: None, mesh.tp.size: mesh.tp}
    for size in mesh.copies:
        if size not in neighbours:
            neighbours[size] = _neighbours(mesh, size)
    found: dict[Group, list[Placed]] = {}
    for p in placed:
        group = neighbours[p.placement.reduce.size // mesh.data.size]
        if group is not None and group.size > 1:
            found.setdefault(group, []).append(p)
    return found


def _neighbours(mesh: Mesh, size: int) -> Group:
    sizes = dict(mesh.axes.dense)
    sizes["tp"] //= size
    lists = partition(sizes | {"copies": size}, ("copies",))
    group, _ = dist.new_subgroups_by_enumeration(lists)
    own = next(ranks for ranks in lists if mesh.rank in ranks)
    return Group(f"{size} of tp", own, group, mesh.traffic)


def _sum_over(group: Group) -> Callable[[Tensor], Tensor]:
    return lambda gradient: group.all_reduce(gradient.clone())


def _multiply(number: int) -> Callable[[Tensor], Tensor]:
    """For stage 3, which can only average. Scaling the loss instead would miss the auxiliary losses:
    their gradients do not depend on it."""
    return lambda gradient: gradient * number


def _share(whole: Tensor, group: Group) -> Tensor:
    """This process's of equal shares of a flattened tensor, which zeros fill up."""
    size = -(-whole.numel() // group.size)
    flat = whole.new_zeros(size * group.size)
    flat[: whole.numel()] = whole.flatten()
    return flat[group.rank * size : (group.rank + 1) * size]


def deepspeed_problems(config: ParallelConfig, model: ModelConfig) -> Iterator[Problem]:
    """What DeepSpeed cannot do under our layers, or was not seen to do."""
    if config.engine != "deepspeed":
        return
    yield from ()
