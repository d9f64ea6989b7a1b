"""On a CUDA device: every operation by every backend against its floor, and the MFU of whole steps.

    .venv/bin/python benchmarks/gpu.py

Peaks are measured in the same run: the rate of a large product in bf16, and that of a copy. The
first table has for each backend that can run the time of a call, forward and backward, and the part
of it that the floor is: bytes over the copy's rate, or FLOPs over the product's
(`benchmarks/operations.py`). Backends take turns, but for those that switch torch's attention over
for the whole process, which come last. What fails is reported with its error, and the rest goes on.

The second table has training steps in bf16 (forward, backward, clipping, fused AdamW) of decoders
that fit into 80 GB, with torch's and with Triton's kernels, experts taking turns (`balanced`) and
chosen by the router (`learned`), weights, moments and residual stream in fp32. Beside them is
Mixtral of Hugging Face transformers, where it is installed, in the same precision (`autocast`) and
with everything in bf16. They are measured one after the other, for want of memory. MFU is of
executed FLOPs, attention over all pairs included; the peer is counted with the same FLOPs. One more
step is profiled: the share of its time in which the device computes, and the kernels that take most
of it.

`--device cpu --quick` runs the same code in small on a CPU, which says nothing about speed. Writes
benchmarks/results/gpu-<device>.json.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import peers
import torch
from machine import parser, prepare, write_result
from models import Trainee, model_config, random_batches, routed
from operations import WORKS, Maker, Work
from operations import Size as OperationSize
from rounds import call, compare, nothing, show
from torch.profiler import ProfilerActivity, profile

from moebius.data.batch import Batch
from moebius.kernels.registry import BACKENDS, Kernels, Operation, choose, is_installed
from moebius.trainer.kernels import KernelsConfig
from moebius.trainer.machine import matmul_flops_per_second

COPIED = 2**30
"""bytes of the copy whose rate is taken for that of memory"""
WARMUP = 3


@dataclass(frozen=True)
class Peaks:
    """What the device can do, measured."""

    flops_per_second: float
    bytes_per_second: float

    def floor(self, work: Work) -> float:
        """Seconds below which an operation cannot be."""
        return max(work.flops / self.flops_per_second, work.bytes / self.bytes_per_second)


@dataclass(frozen=True)
class StepSize:
    """A decoder and a batch."""

    hidden: int
    layers: int
    heads: int
    vocabulary: int
    width: int
    experts: int
    rows: int
    length: int

    def shape(self) -> tuple[int, int, int, int]:
        """Arguments that all models have in common."""
        return self.hidden, self.layers, self.heads, self.vocabulary


OPERATIONS = OperationSize()
STEPS = (
    StepSize(1024, 12, 16, 32_000, 1408, 16, rows=16, length=1024),
    StepSize(2048, 8, 16, 32_000, 2816, 16, rows=8, length=2048),
)
"""0.9 and 2.4 billion parameters, 16 bytes of each"""
KERNELS = {
    "torch": KernelsConfig(backend="torch"),
    "triton": KernelsConfig(backend="triton", attention="varlen"),
}
QUICK_OPERATIONS = OperationSize(2, 32, 32, 48, 4, 2, 2, 128)
QUICK_STEPS = (StepSize(32, 1, 2, 512, 32, 4, rows=2, length=16),)


def synchronizer(device: torch.device) -> Callable[[], None]:
    """Waits for a device."""
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


def measure_peaks(device: torch.device, dtype: torch.dtype, size: int) -> Peaks:
    """Of products and copies."""
    flops = matmul_flops_per_second(device, dtype, 0.5)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = call(lambda: target.copy_(source))
    taken = compare({"copy": copy}, "copy", nothing, 10, 3, synchronizer(device))
    return Peaks(flops, 2 * size / min(taken.seconds["copy"]))


def reason(error: Exception) -> str:
    """What is reported of a failure: its first line."""
    lines = str(error).splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0]}"


def show_errors(found: Mapping[str, Mapping[str, object]]) -> None:
    """Print what failed, and why."""
    for name, about in found.items():
        if "error" in about:
            print(f"{name}: {about['error']}")


def turns_of(operation: Operation, device: torch.device, dtype: torch.dtype) -> list[list[str]]:
    """Backends that can run; those that can take turns first, then each of the others."""
    able = {n: b for n, b in BACKENDS[operation].items() if b.problem(device, dtype) is None}
    together = [name for name, backend in able.items() if backend.flash_implementation is None]
    alone = [[name] for name, backend in able.items() if backend.flash_implementation is not None]
    return [together, *alone]


def try_backend(
    operation: Operation, name: str, work: Work, device: torch.device, dtype: torch.dtype
) -> Kernels | str:
    """Its functions, after a first call, in which it compiles; or why it failed."""
    try:
        kernels = choose({operation: name}, device, dtype)
        work.run(kernels)
        synchronizer(device)()
    except Exception as error:  # whatever it is, the other backends are still worth knowing
        return reason(error)
    return kernels


def measure_operation(
    operation: Operation, maker: Maker, peaks: Peaks, rounds: int
) -> dict[str, dict[str, object]]:
    """By backend."""
    device, dtype = maker.device, maker.dtype
    work = WORKS[operation](maker)
    floor = peaks.floor(work)
    found: dict[str, dict[str, object]] = {}
    turns = turns_of(operation, device, dtype)
    for names in turns:
        tried = {name: try_backend(operation, name, work, device, dtype) for name in names}
        found |= {name: {"error": why} for name, why in tried.items() if isinstance(why, str)}
        candidates = {
            name: call(partial(work.run, kernels))
            for name, kernels in tried.items()
            if isinstance(kernels, Kernels)
        }
        if not candidates:
            continue
        taken = compare(
            candidates, next(iter(candidates)), nothing, rounds, 1, synchronizer(device), 5
        )
        for name, times in taken.report().items():
            part = floor / taken.median(name)
            found[name] = {**times, "floor_ms": 1e3 * floor, "floor_over_time": round(part, 4)}
    if len(turns) > 1:  # what was switched over would stay so for training steps
        torch.nn.attention.restore_flash_attention_impl()
    return found


def measure_operations(maker: Maker, peaks: Peaks, rounds: int) -> dict[str, object]:
    """All operations; the table is printed."""
    found: dict[str, object] = {}
    every: dict[str, dict[str, object]] = {}
    rows = []
    for operation in WORKS:
        backends = measure_operation(operation, maker, peaks, rounds)
        found[operation] = backends
        for name, about in backends.items():
            cells = [about.get(key, "") for key in ("median_ms", "floor_ms", "floor_over_time")]
            rows.append([f"{operation}, {name}", *cells])
            every[f"{operation}, {name}"] = about
        free(maker.device)
    columns = ("operation, backend", "median ms", "floor ms", "floor / time")
    show(f"operations, forward and backward, {maker.size}", columns, rows)
    show_errors(every)
    return found


def seconds_per_step(
    step: Callable[[Batch], object], size: StepSize, device: torch.device, steps: int
) -> float:
    """The median, each step with the device idle before and after."""
    draw = random_batches(size.rows, size.length, size.vocabulary, device)
    wait = synchronizer(device)
    seconds = []
    for number in range(WARMUP + steps):
        batch = draw(number)
        wait()
        began = time.perf_counter()
        step(batch)
        wait()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARMUP:])


def busiest(step: Callable[[Batch], object], batch: Batch, seconds: float) -> dict[str, object]:
    """Share of a step in which the device computes, and of that the kernels that take most."""
    if not batch.tokens_BS.is_cuda:
        return {}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step(batch)
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in profiler.key_averages():  # annotations are there, too, over what they enclose
        if event.device_type.name == "CUDA" and "#" not in event.key:
            times[event.key] = times.get(event.key, 0.0) + event.self_device_time_total / 1e6
    total = sum(times.values())
    most = sorted(times, key=lambda name: -times[name])[:12]
    shares = {name[:90]: round(times[name] / total, 4) for name in most}
    return {"device_busy": round(total / seconds, 3), "kernel_shares": shares}


def own_step(
    kernels: KernelsConfig,
    balanced: bool,
    size: StepSize,
    device: torch.device,
    dtype: torch.dtype,
    steps: int,
) -> dict[str, Any]:
    """Seconds and FLOPs of a step of our model."""
    config = model_config(*size.shape(), routed(size.width, size.experts, balanced))
    try:
        trainee = Trainee(config, size.length, dtype, device, kernels)
        seconds = seconds_per_step(trainee.step, size, device, steps)
        about = {"kernels": trainee.kernel_names, "parameters": trainee.num_parameters}
        about |= {"flops": trainee.flops}
        batch = random_batches(size.rows, size.length, size.vocabulary, device)(0)
        return {"seconds": seconds, **about, **busiest(trainee.step, batch, seconds)}
    except Exception as error:  # whatever it is, the others are still worth knowing
        return {"error": reason(error)}


def peer_step(
    size: StepSize, device: torch.device, dtype: torch.dtype, steps: int, autocast: bool
) -> dict[str, Any]:
    """Mixtral with fused AdamW; products in a precision, and all else, too, or in fp32."""
    try:
        model = peers.build("mixtral", *size.shape(), size.width, size.experts)
        model = model.to(device, torch.float32 if autocast else dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
        plain = peers.stepper(model, optimizer, foreach=True)

        def step(batch: Batch) -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                plain(batch)

        seconds = seconds_per_step(step, size, device, steps)
        batch = random_batches(size.rows, size.length, size.vocabulary, device)(0)
        about = {"experts": peers.experts_implementation(model)}
        return {"seconds": seconds, **about, **busiest(step, batch, seconds)}
    except Exception as error:
        return {"error": reason(error)}


def free(device: torch.device) -> None:
    """What was measured last has left memory behind, which the next one needs."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def measure_steps(
    size: StepSize, device: torch.device, dtype: torch.dtype, peaks: Peaks, steps: int
) -> dict[str, object]:
    """All models of a size; the table is printed."""
    found: dict[str, dict[str, Any]] = {}
    for (name, kernels), routing in product(KERNELS.items(), ("balanced", "learned")):
        balanced = routing == "balanced"
        about = own_step(kernels, balanced, size, device, dtype, steps)
        found[f"moebius, {name}, {routing}"] = about
        free(device)
    if is_installed("transformers"):
        for name, autocast in (("autocast", True), ("all in bf16", False)):
            about = peer_step(size, device, dtype, steps, autocast)
            found[f"transformers, mixtral, {name}"] = about
            free(device)
    flops = max((about.get("flops", 0) for about in found.values()), default=0)
    rows = []
    for name, about in found.items():
        if "seconds" in about:
            per_second = 1 / about["seconds"]
            mfu = about.get("flops", flops) * per_second / peaks.flops_per_second
            about["mfu"] = round(mfu, 4)
            about["tokens_per_second"] = round(size.rows * size.length * per_second)
        cells = [about.get(key, "") for key in ("seconds", "tokens_per_second", "mfu")]
        rows.append([name, *cells])
    show(f"training steps, {size}", ("", "seconds", "tokens / s", "MFU"), rows)
    show_errors(found)
    return {"size": str(size), "steps": found}


def about_device(device: torch.device) -> dict[str, object]:
    """What a result file says about it."""
    if device.type != "cuda":
        return {"device": "cpu"}
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "device": torch.cuda.get_device_name(device),
        "capability": f"{major}.{minor}",
        "cuda": torch.version.cuda,
    }


def main() -> None:
    """Measure and write the result."""
    options = parser(__doc__)
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = options.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device, and torch sees none")
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    if not on_gpu:
        prepare()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    peaks = measure_peaks(device, dtype, COPIED if on_gpu else 2**24)
    size, sizes = (QUICK_OPERATIONS, QUICK_STEPS) if arguments.quick else (OPERATIONS, STEPS)
    rounds, steps = (1, 1) if arguments.quick else (7, 10)
    about = about_device(device)
    found: list[dict[str, object]] = []
    result = {
        **about,
        "precision": str(dtype).removeprefix("torch."),
        "product_tflops": round(peaks.flops_per_second / 1e12, 2),
        "copy_gigabytes_per_second": round(peaks.bytes_per_second / 1e9, 1),
        "operations_size": str(size),
        "operations": measure_operations(Maker(size, device, dtype), peaks, rounds),
        "training": found,
    }
    label = str(about["device"]).lower().replace(" ", "-") if on_gpu else None
    write_result("gpu", result, arguments.out, label)
    for each in sizes:  # a lent machine may be taken back: what is measured is kept
        found.append(measure_steps(each, device, dtype, peaks, steps))
        write_result("gpu", result, arguments.out, label)


if __name__ == "__main__":
    main()
