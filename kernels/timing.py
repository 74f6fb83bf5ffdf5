"""Times of several forms of one computation, taken in turn so that a machine's drift falls on all of them."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

# Cycles that the GPU waits before a timed call, about a millisecond: longer than queueing any call takes.
PAUSE = 2_000_000


@dataclass(frozen=True)
class Spread:
    """Seconds of one call: median and quartiles over `runs` calls."""

    median: float
    lower: float
    upper: float
    runs: int

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, lower, upper, len(seconds))


class Clock:
    """Times calls on a device: with CUDA's events there and the processor's counter elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Written before each call on CUDA, so that none finds its inputs in the cache: H100's holds 50 MB.
        self.sweep = torch.empty(2**28 if device.type == "cuda" else 0, dtype=torch.uint8, device=device)

    def seconds(self, call: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        begins, ends = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.sweep.zero_()
        # A pause of the GPU, in which the processor queues the call: else its own time would be in between.
        if hasattr(torch.cuda, "_sleep"):
            torch.cuda._sleep(PAUSE)
        begins.record()
        call()
        ends.record()
        torch.cuda.synchronize(self.device)
        return begins.elapsed_time(ends) / 1000

    def wall_seconds(self, call: Callable[[], Any], calls: int = 10) -> float:
        """Seconds a call from the caller's side, launches included: of `calls` in a row, their end waited for."""
        self._wait()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        self._wait()
        return (time.perf_counter() - begin) / calls

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def compare(self, forms: dict[str, Callable[[], Any]], budget: float) -> dict[str, Spread]:
        """Spreads by name: 3 to 50 rounds of all forms, as many as take about `budget` seconds.

        The first call of each form (compiling, first touch of memory) is not counted; rounds start with a
        different form each time.
        """
        names = list(forms)
        for name in names:
            self.seconds(forms[name])
        rough = sum(self.seconds(forms[name]) for name in names)
        rounds = min(50, max(3, int(budget / max(rough, 1e-9))))
        taken: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                taken[name].append(self.seconds(forms[name]))
        return {name: Spread.of(seconds) for name, seconds in taken.items()}


def measured_rates(clock: Clock, dtype: torch.dtype, quick: bool) -> dict[str, Any]:
    """Bytes a second of a large copy (read and written both counted) and FLOPs a second of a large square product."""
    gpu = clock.device.type == "cuda"
    size = 2**29 if gpu else 2**24 if quick else 2**26
    source = torch.zeros(size, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    side = 8192 if gpu else 512 if quick else 1024
    square = torch.randn(side, side, device=clock.device).to(dtype)
    spreads = clock.compare(
        {"copy": lambda: target.copy_(source), "matmul": lambda: square @ square}, budget=1.0
    )
    return {
        "bytes_per_second": 2 * size / spreads["copy"].median,
        "flops_per_second": 2 * side**3 / spreads["matmul"].median,
        "copy": asdict(spreads["copy"]) | {"bytes": 2 * size},
        "matmul": asdict(spreads["matmul"]) | {"side": side, "dtype": str(dtype).removeprefix("torch.")},
    }


def machine(device: torch.device, name: str | None) -> dict[str, Any]:
    """What the times were taken on; the load is that of the last minute before the run."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "name": name or gpu or processor(),
        "gpu": gpu,
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {
            package: installed(package) for package in ("torch", "triton", "transformers", "lvlm-fix")
        },
    }


def installed(package: str) -> str | None:
    """A package's version, None where it is not installed, as Triton outside Linux."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's model, as Linux names it."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def free_bytes(device: torch.device) -> int:
    """Memory that a run may fill: what the GPU has free, or what Linux calls available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    described = Path("/proc/meminfo")
    lines = described.read_text().splitlines() if described.exists() else []
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return available[0] if available else 2**32
