"""Stands in for CUDA graphs without a GPU: records torch's operations and does them again, in the same memory."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lvlm_fix import pipeline


class RecordedOperations(TorchDispatchMode):
    """What `torch.cuda.CUDAGraph` does; as there, what is recorded has no values until it is replayed."""

    made: ClassVar[list[RecordedOperations]] = []

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self.replayed = 0
        RecordedOperations.made.append(self)

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        self.__enter__()

    def capture_end(self) -> None:
        self.__exit__(None, None, None)
        for _, _, _, made in self.operations:
            for x in made:
                x.fill_(torch.nan if x.is_floating_point() else 0)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if str(function.overloadpacket).removeprefix("aten.") in ("item", "_local_scalar_dense", "nonzero"):
            raise RuntimeError(
                "operation not permitted when stream is capturing\nSearch for it in the documentation."
            )
        output = function(*args, **(kwargs or {}))
        given = {
            x.untyped_storage().data_ptr() for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)
        }
        made = [x for x in tree_flatten(output)[0] if isinstance(x, Tensor)]
        # Views and operations in place have no memory of their own to be filled.
        made = [x for x in made if x.untyped_storage().data_ptr() not in given]
        self.operations.append((function, args, kwargs or {}, made))
        return output

    def replay(self) -> None:
        self.replayed += 1
        for function, args, kwargs, made in self.operations:
            again = [x for x in tree_flatten(function(*args, **kwargs))[0] if isinstance(x, Tensor)]
            for x, value in zip(made, again if made else [], strict=True):
                x.copy_(value)


def stand_in(monkeypatch: Any) -> type[RecordedOperations]:
    """Let compile=True record operations on the CPU; returns the class, which knows what was made."""
    RecordedOperations.made.clear()
    monkeypatch.setattr(pipeline, "replays", lambda model: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedOperations)
    for name in ("graph_pool_handle", "current_stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return RecordedOperations
