"""Configuration of the layout: how many processes along which axis, and who holds what."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from moebius.config import ConfigNode
from moebius.parallel.schedule import ScheduleName


class PipelineConfig(ConfigNode):
    """How a program is cut into stages and in which order they work."""

    schedule: ScheduleName = "1f1b"
    """order of forward and backward passes; zero_bubble where no weights are shared"""
    stages_per_rank: PositiveInt = 1
    """stages of each process, for interleaved_1f1b and zero_bubble"""
    costs: Annotated[tuple[NonNegativeFloat, ...], Field(strict=False)] | None = None
    """what each unit (a visit, or a pass of a routed loop) and, last, the head cost, as measured;
    null: modelled FLOPs"""


class RingConfig(ConfigNode):
    """How a looped block is cut into slices, and how micro-batches go around the ring of them."""

    live: PositiveInt | None = None
    """micro-batches that are on their way at a time; null: three for each process, six with
    merge"""
    recompute: bool = True
    """keep only the input of a visit to a slice, and compute the rest again for its gradients"""
    merge: bool = False
    """join as many micro-batches as there are passes, and cut each pass into chunks of about
    train.micro_batch_size * data.sequence_length tokens: fewer and larger visits, more idle time"""
    costs: Annotated[tuple[NonNegativeFloat, ...], Field(strict=False)] | None = None
    """what each layer costs on full rows and, last, the head, as measured; null: modelled FLOPs"""


class ContextConfig(ConfigNode):
    """How rows are cut where several processes share them."""

    adaptive: bool = False
    """place documents so that each is on as few processes as its length and their memory ask for,
    which alone then exchange its keys and values; otherwise rows are cut where they are"""
    room: float = Field(1.25, ge=1)
    """tokens that a process may hold where documents are placed, times an even share"""
    flops_per_byte: float = Field(2000.0, gt=0)
    """FLOPs that a process computes in the time in which it sends a byte"""


class DeepSpeedConfig(ConfigNode):
    """What DeepSpeed's ZeRO does under our layers."""

    stage: Literal[1, 2, 3] = 1
    """1: the optimizer's state is shared out; 2: gradients too; 3: parameters too"""
    offload_optimizer: bool = False
    """keep the optimizer's state in the host's memory and step there"""


class ParallelConfig(ConfigNode):
    """Axes of the mesh of processes, outermost first: pp or rp, dp_replicate, dp_shard, cp, tp.

    Data parallelism takes the processes that the other axes leave. Experts have axes of their own
    over the processes that hold the same layers: edp, ep, etp.
    """

    engine: Literal["native", "deepspeed"] = "native"
    """who reduces gradients and steps; deepspeed takes the place of `data`"""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """with engine deepspeed"""
    data: Literal["ddp", "zero1", "fsdp2"] = "zero1"
    """what data-parallel processes share out: ddp, nothing; zero1, the optimizer's state, with one
    reduce-scatter and one all-gather per step; fsdp2, parameters and gradients too"""
    dp_replicate: PositiveInt = 1
    """with fsdp2: groups of processes, each of which holds all parameters (HSDP)"""
    pp: PositiveInt = 1
    """pipeline stages side by side"""
    rp: PositiveInt = 1
    """recursion parallelism: the block of a loop is cut into so many slices, each of which its
    process holds once and applies in every pass"""
    cp: PositiveInt = 1
    """context parallelism: each row is cut into so many parts"""
    tp: PositiveInt = 1
    """tensor parallelism: attention heads, widths and vocabulary are cut into so many parts"""
    sequence_parallel: bool = True
    """with tp: what lies between split weights is computed for a part of the tokens each"""
    ep: PositiveInt = 1
    """expert parallelism: so many processes hold a part of the experts each"""
    etp: PositiveInt = 1
    """expert tensor parallelism: the width of each expert is cut into so many parts"""
    pipeline: PipelineConfig = PipelineConfig()
    """with pp"""
    ring: RingConfig = RingConfig()
    """with rp"""
    context: ContextConfig = ContextConfig()
    """with cp"""
    timeout: float = Field(600.0, gt=0)
    """seconds that a collective waits for the other processes"""

    @property
    def model_size(self) -> int:
        """Processes that work on the same rows."""
        return self.pp * self.rp * self.cp * self.tp
