"""Triton kernels without a GPU: run by the interpreter, or compiled for a GPU that is not here.

Triton chooses its interpreter when it is imported, which transformers may have done long ago: interpreted cases
live in `tests/interpreted/`, under names that pytest does not collect by itself, and run in a process of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Bytes of shared memory that one program may have, by compute capability (CUDA C++ programming guide, table
# "Technical specifications per compute capability").
SHARED = {80: 166_912, 90: 232_448}
# Registers of a multiprocessor, in either.
REGISTERS = 65_536
INTERPRETED = Path(__file__).parent / "interpreted"
TYPES = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
# Pointers of torch and strides of usual heads are divisible by 16, which a launch finds out and the compiler uses.
DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes: registers a thread, stack bytes a thread, shared bytes and warps a program."""

    registers: int
    stack: int
    shared: int
    warps: int


def compiled_usage(
    kernel: Any,
    capability: int,
    types: dict[str, str],
    constants: dict[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Usage:
    """Compile `kernel` for sm_80 or sm_90 and read off what it takes.

    `types` gives the type of each argument that is no constant; pointers and those whose type ends in "!"
    (an integer divisible by 16, such as a stride) are compiled as a launch would.
    """
    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else types[name].removesuffix("!") for name in names}
    attributes = {
        (place,): DIVISIBLE
        for place, name in enumerate(names)
        if name not in constants and (types[name].startswith("*") or types[name].endswith("!"))
    }
    source = ASTSource(kernel, signature, constants, attributes)
    # Unset, Triton 3.9 warns that 3.10 will fuse no multiply-adds.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _of_cubin(compiled.asm["cubin"])
    return Usage(registers, stack, compiled.metadata.shared, num_warps)


def require_fits(usage: Usage, capability: int) -> None:
    """Nothing is spilled (a spill lives on the stack), and one program fits in a multiprocessor."""
    assert usage.stack == 0, f"{usage} spills registers"
    assert usage.shared <= SHARED[capability], f"{usage} takes more shared memory than sm_{capability} has"
    assert usage.registers * usage.warps * 32 <= REGISTERS, f"{usage} takes more registers than there are"


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _of_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes a thread, as Triton's own cuobjdump prints them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        printed = subprocess.run(
            [tool, "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    assert found is not None, f"cuobjdump printed no registers: {printed}"
    return int(found[1]), int(found[2])


def run_interpreted(cases: str, passed: int) -> None:
    """Run `tests/interpreted/<cases>` with Triton's interpreter; exactly `passed` tests pass and none is skipped."""
    if triton.__version__.startswith("3.6.") and _version(numpy.__version__) >= (2, 4):
        pytest.skip("Triton 3.6's interpreter takes int() of a one-element array, which numpy 2.4 refuses")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", INTERPRETED / cases]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=INTERPRETED.parents[1])
    assert ran.returncode == 0, ran.stdout + ran.stderr
    last = ran.stdout.strip().splitlines()[-1]
    assert re.match(rf"{passed} passed(, \d+ warnings?)? in ", last), last
