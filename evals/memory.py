"""Peak memory of a stretch of work: of the GPUs where the model is on one, else of this process."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Starts counting when made; where the system cannot start afresh, the peak before counts too."""

    def __init__(self, device: Any) -> None:
        self.on_gpu = getattr(device, "type", device) == "cuda"
        if self.on_gpu:
            import torch

            for index in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(index)
        else:
            with suppress(OSError):  # "5" resets the peak, as proc(5) says
                Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Bytes, so far; 0 where the system does not say."""
        if self.on_gpu:
            import torch

            return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
        try:
            lines = _STATUS.read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
        except (OSError, StopIteration):
            return _getrusage()


def _getrusage() -> int:
    import sys

    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
