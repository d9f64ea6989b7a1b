"""Compile the Triton kernels of a module for GPUs that are not here; prints a JSON line for each.

    python -m tests.kernels.ahead moebius.kernels.triton.rms_norm

A process of its own: kernels are made for the interpreter or for compiling when they are imported.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moebius.kernels.triton.launch import Variant

ARCHITECTURES = (90, 100)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def stack_bytes(cubin: bytes) -> int:
    """Local memory of a thread: anything above 0 is a spill."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"STACK:(\d+)", text)
    assert found, text
    return max(map(int, found))


def compile_ahead(variant: Variant, architecture: int) -> dict[str, Any]:
    """What the compiler makes of a variant."""
    kernel, names = variant.kernel, variant.kernel.arg_names
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    missing = [n for n in names if signature[n] == "constexpr" and n not in variant.constants]
    assert not missing, f"{kernel.__name__}: neither a type nor a constant: {missing}"
    divisible = {n for n, t in variant.types.items() if t.startswith("*")} | set(variant.divisible)
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options=options)
    ptx = compiled.asm["ptx"]
    return {
        "kernel": kernel.__name__,
        "types": dict(variant.types),
        "architecture": architecture,
        "stack": stack_bytes(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "tensor_cores": "wgmma" in ptx or "tcgen05" in ptx,
        "has_products": variant.has_products,
    }


def main() -> None:
    """Compile every variant of the modules that are named."""
    for name in sys.argv[1:]:
        for variant in importlib.import_module(name).variants():
            for architecture in ARCHITECTURES:
                print(json.dumps(compile_ahead(variant, architecture)), flush=True)


if __name__ == "__main__":
    main()
