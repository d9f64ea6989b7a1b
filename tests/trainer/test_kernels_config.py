"""Kernels and CPU settings by config: what is chosen, what is refused, what is said."""

from typing import Any

import pytest
import torch

from moebius.errors import LayoutError
from moebius.kernels.cpp import build
from moebius.kernels.registry import BACKENDS, OPERATIONS, PLAIN, Operation, is_installed
from moebius.model.config import ModelConfig
from moebius.model.context import compiled
from moebius.trainer import cpu
from moebius.trainer.config import RunConfig, compile_rules, identity
from moebius.trainer.cpu import CPUConfig, prepare_cpu, uses_onednn
from moebius.trainer.kernels import KernelsConfig, choose_kernels
from tests.parity.forks import run_forked

CPU = torch.device("cpu")
FFN = {"kind": "ffn", "count": 8, "intermediate_size": 16}
MOE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 16,
    "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
    "ffn": {"kind": "moe", "experts": [FFN], "router": {}},
    "depth": {"num_layers": 1},
}


def model(count: int = 8) -> ModelConfig:
    return ModelConfig.model_validate(
        MOE | {"ffn": MOE["ffn"] | {"experts": [FFN | {"count": count}]}}
    )


def chosen(dtype: torch.dtype = torch.float32, count: int = 8, **options: Any) -> tuple[Any, str]:
    return choose_kernels(KernelsConfig.model_validate(options), model(count), CPU, dtype)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_backend_can_be_named(operation: Operation) -> None:
    for name in BACKENDS[operation]:
        assert getattr(KernelsConfig.model_validate({operation: name}), operation) == name


def test_a_cpu_gets_what_there_is_in_cpp() -> None:
    in_cpp = [operation for operation, backends in BACKENDS.items() if "cpp" in backends]
    kernels, said = chosen(alignment=1)
    assert said == f"kernels: {', '.join(f'{name} cpp' for name in in_cpp)}, torch"
    for operation in in_cpp:
        for field in BACKENDS[operation]["cpp"].functions:
            assert "cpp" in getattr(kernels, field).__module__
    assert chosen(backend="cpp", alignment=1) == (kernels, said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_compiler_it_gets_the_definitions_and_attention_in_blocks(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "it has no kernels for float64"
    if dtype == torch.float32:
        reason = "there is no C++ compiler"
        monkeypatch.setattr(build, "load", lambda: reason)
    kernels, said = chosen(dtype, alignment=1)
    assert kernels.grouped_swiglu is PLAIN.grouped_swiglu
    assert kernels.attention is not PLAIN.attention
    assert said == f"kernels: attention blocks, torch, no cpp ({reason})"
    with pytest.raises(LayoutError, match=r"kernels\.rope: cpp, but (there is|it has) no"):
        chosen(dtype, rope="cpp")


def _said(options: dict[str, Any]) -> str:
    """What is said, or refused, where the second process has no compiler."""
    if torch.distributed.get_rank() == 1:
        build.load = lambda: "there is no C++ compiler"  # type: ignore[assignment]
    try:
        return chosen(alignment=1, **options)[1]
    except LayoutError as error:
        return str(error)


def test_what_one_process_cannot_run_none_takes() -> None:
    """Copies of a tensor must not be rounded differently."""
    for options, said in (
        ({}, "kernels: attention blocks, torch, no cpp (there is no C++ compiler)"),
        ({"rope": "cpp"}, "kernels.rope: cpp, but there is no C++ compiler"),
    ):
        results = run_forked(2, _said, options)
        assert all(result.startswith(said) for result in results), results


def test_definitions_alone_are_a_choice_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "load", lambda: pytest.fail("nobody wants it"))
    kernels, said = chosen(backend="torch", alignment=1)
    assert kernels == PLAIN
    assert said == "kernels: attention sdpa, torch"


@pytest.mark.parametrize(
    ("capability", "dtype", "options", "said"),
    [
        ((9, 0), torch.bfloat16, {}, "permute triton, grouped_gemm triton"),
        ((10, 0), torch.bfloat16, {"grouped_gemm": "torch"}, "permute triton, zero_experts triton"),
        ((8, 0), torch.bfloat16, {}, "kernels: attention sdpa, torch"),
        ((9, 0), torch.float32, {}, "kernels: attention sdpa, torch"),
        ((9, 0), torch.bfloat16, {"compile": True}, "kernels: attention sdpa, torch"),
        ((9, 0), torch.bfloat16, {"backend": "torch"}, "kernels: attention sdpa, torch"),
    ],
)
def test_a_gpu_gets_triton_where_it_has_been_timed(
    capability: tuple[int, int],
    dtype: torch.dtype,
    options: dict[str, Any],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = KernelsConfig.model_validate(options)
    kernels, line = choose_kernels(config, model(), torch.device("cuda"), dtype)
    assert said in line
    assert "attention sdpa" in line
    assert ("triton" in kernels.permute.__module__) == ("permute triton" in said)
    assert ("triton" in kernels.grouped_swiglu.__module__) == ("gemm triton" in said)


def test_groups_are_padded_where_onednn_multiplies() -> None:
    assert chosen()[0].alignment == (32 if uses_onednn() else 1)
    assert chosen(torch.bfloat16)[0].alignment == 32
    assert chosen(torch.bfloat16, count=64)[0].alignment == 16
    assert chosen(torch.bfloat16, alignment=8)[0].alignment == 8


@pytest.mark.parametrize(
    ("operation", "name", "package"),
    [
        ("grouped_gemm", "megablocks", "megablocks"),
        ("attention", "varlen", "torch.nn.attention.varlen"),
        ("attention", "fa3", "flash_attn_interface"),
        ("attention", "fa4", "flash_attn.cute"),
        ("attention", "flash_attn", "flash_attn"),
    ],
)
def test_what_needs_a_gpu_or_a_package_is_refused_by_name(
    operation: str, name: str, package: str
) -> None:
    with pytest.raises(LayoutError) as caught:
        chosen(**{operation: name})
    missing = f"the package {package} is not installed"
    reason = "it has no kernels for device cpu" if is_installed(package) else missing
    message, _, hint = str(caught.value).partition(" - ")
    assert message == f"kernels.{operation}: {name}, but {reason}"
    assert hint


def test_triton_is_refused_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(LayoutError, match=r"kernels\.backend: triton, but it has no kernels"):
        chosen(backend="triton")
    with pytest.raises(LayoutError, match=r"kernels\.rope: triton, but it has no kernels"):
        chosen(rope="triton")


def test_every_backend_that_can_be_loaded_here_has_its_functions() -> None:
    pytest.importorskip("triton")
    kernels, _ = chosen(backend="triton")
    for operation, backends in BACKENDS.items():
        for field in backends["triton"].functions if "triton" in backends else ():
            assert getattr(kernels, field) is not getattr(PLAIN, field), operation


def test_the_compiler_is_asked_for_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LayoutError, match="there is no C\\+\\+ compiler"):
        chosen(compile=True)


def test_kernels_and_cpu_may_change_when_a_run_is_continued(run_config: RunConfig) -> None:
    paths = identity(run_config)
    assert not [path for path in paths if path.startswith(("kernels", "cpu"))]


@pytest.mark.parametrize("library", ["mkl", "onednn"])
def test_products_in_fp32_are_exact_with_either_library(library: Any) -> None:
    config = CPUConfig(fp32_products=library, keep_memory=False, threads=1)
    if library == "onednn" and torch.cpu._is_amx_tile_supported():  # multiplies in bf16
        with pytest.raises(LayoutError, match=r"cpu\.fp32_products: onednn, whose products"):
            list(prepare_cpu(config, "fp32"))
        return
    assert list(prepare_cpu(config, "fp32")) == [f"cpu: 1 threads, fp32 products by {library}"]
    assert uses_onednn() == (library == "onednn")
    a, b = torch.randn(2, 128, 128, generator=torch.Generator().manual_seed(1))
    exact = a.double() @ b.double()
    assert float((a @ b - exact).abs().max() / exact.abs().max()) < 5e-6


def test_a_library_is_not_chosen_where_it_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "WORST_FP32", 0.0)
    monkeypatch.setattr(cpu, "_is_amd_with_avx512", lambda: True)
    (said,) = prepare_cpu(CPUConfig(keep_memory=False), "fp32")
    assert said.endswith("fp32 products by mkl")
    assert not uses_onednn()
    with pytest.raises(LayoutError, match=r"cpu\.fp32_products: onednn, whose products"):
        list(prepare_cpu(CPUConfig(keep_memory=False, fp32_products="onednn"), "fp32"))


def test_slow_bf16_is_told() -> None:
    said = list(prepare_cpu(CPUConfig(keep_memory=False), "bf16"))
    assert len(said) == (1 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else 2)


COMPILED = {"kernels": {"compile": True}}


@pytest.mark.parametrize(
    ("fields", "path", "words"),
    [
        ({"parallel": {"tp": 2}}, "kernels.compile", "parallel.tp=2"),
        ({"parallel": {"engine": "deepspeed"}}, "kernels.compile", "engine=deepspeed"),
        ({"kernels": {"compile": True, "attention": "blocks"}}, "kernels.attention", "use sdpa"),
        ({"kernels": {"compile": True, "attention": "varlen"}}, "kernels.attention", "use sdpa"),
        ({"kernels": {"compile": True, "rope": "cpp"}}, "kernels.rope", "use torch"),
        ({"kernels": {"compile": True, "backend": "cpp"}}, "kernels.backend", "use torch"),
    ],
)
def test_what_cannot_be_compiled_is_refused(
    run_config: RunConfig, fields: Any, path: str, words: str
) -> None:
    config = RunConfig.model_validate(run_config.model_dump() | COMPILED | fields)
    problems = list(compile_rules(config))
    assert [(p.path, words in p.message) for p in problems] == [(path, True)]


def test_a_layer_that_cannot_be_compiled_is_one_line() -> None:
    def layer(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(
        LayoutError, match=r"kernels\.compile: true, but a layer of this model"
    ) as it:
        compiled(layer)(torch.zeros(2))
    assert "\n" not in str(it.value)
