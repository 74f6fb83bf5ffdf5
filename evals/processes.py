"""Which process of a run this is, as launchers say in the environment."""

from __future__ import annotations

import os
import warnings
from typing import NamedTuple

# Of rank, number of processes, and rank on the machine: torchrun's (also `accelerate launch` on GPUs and with
# --multi_gpu), then those of mpirun, which `accelerate launch --cpu --mpirun_hostfile` calls.
_NAMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)


class Process(NamedTuple):
    """Which of how many processes this is."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def file_rank(self) -> int | None:
        """Which results file is this process's own; None where it is alone."""
        return self.rank if self.world > 1 else None

    @classmethod
    def from_environment(cls) -> Process:
        """What torchrun, `accelerate launch` or mpirun say; without them the only process.

        Raises `ValueError` for variables that do not go together.
        """
        for names in _NAMES:
            given = [os.environ.get(name) for name in names]
            if given[0] is not None and given[1] is not None:
                return cls._checked(names, given)
        return cls()

    @classmethod
    def _checked(cls, names: tuple[str, str, str], given: list[str | None]) -> Process:
        try:
            process = cls(*(int(value or 0) for value in given))
        except ValueError:
            raise ValueError(f"{', '.join(names)} are {given}; they must be whole numbers") from None
        if not 0 <= process.rank < process.world:
            rank, world, _ = names
            raise ValueError(f"{rank} is {process.rank} of {world} {process.world}; ranks count from 0")
        return process


def warn_if_alone() -> None:
    """Warn where `accelerate launch` was asked for several processes on CPU and, without mpirun, started one.

    It says so nowhere itself; of its command line an address for the others to meet at is all that is left.
    """
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in os.environ
    if asked and Process.from_environment().world == 1:
        warnings.warn(
            "accelerate launch --cpu starts one process without mpirun, so this one does all the work; for "
            "several on one machine say torchrun --nproc_per_node N, or accelerate launch --multi_gpu",
            stacklevel=2,
        )
