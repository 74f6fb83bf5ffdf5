"""The vision tower on a GPU as one CUDA graph, with what is read of its attention in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lvlm_fix.errors import UnsupportedModelError
from lvlm_fix.interception import standing_in
from lvlm_fix.kernels.fused.launch import on_device_of
from lvlm_fix.recorder import TowerRecorder
from lvlm_fix.recording import Recordings, asked_of, may_record, own

MOST_CROPS = 8
"""Crops at once up to which the tower is recorded: more take the device longer than the host."""


class ReplayedTower:
    """A tower's forward pass from pixels alone, and what `recorder` reads as it runs.

    What it returns holds hidden states that the next picture's are written over.
    """

    def __init__(self, tower: nn.Module, recorder: TowerRecorder | None) -> None:
        self.tower, self.recorder = tower, recorder
        self.names = tuple(inspect.signature(tower.forward).parameters)
        self.recordings = Recordings("vision tower")
        self.refused: set[Any] = set()

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Within, the tower is replayed where it can be; what follows it is queued as ever."""
        forward = self.tower.forward
        with standing_in({self.tower: partial(self._forward, forward)}):
            yield

    def _forward(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        inputs = dict(zip(self.names, args, strict=False)) | kwargs
        tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
        # Other tensors than pixels are numbers of patches and the like, which the host reads.
        if len(tensors) != 1 or len(tensors[0]) > MOST_CROPS or torch.is_grad_enabled():
            return forward(*args, **kwargs)
        device = tensors[0].device
        asked = asked_of(inputs, device)
        with on_device_of(tensors[0]):
            recording = self.recordings.next(asked, partial(self._may_record, asked, device))
            if recording is None:
                return forward(*args, **kwargs)
            try:
                with self._reading_apart():
                    output, read = self.recordings.output(
                        recording, asked, partial(self._with_what_is_read, forward), inputs
                    )
            except UnsupportedModelError:
                # Nothing is lost: this tower is queued, as without recordings.
                self.refused.add(asked)
                return forward(*args, **kwargs)
        if self.recorder is not None:
            self.recorder.give(own(read))
        if not isinstance(output, dict):
            return own(output)
        # Of the hidden states the next module takes one; to copy all would take longer than to replay.
        return type(output)(**{name: x if name == "hidden_states" else own(x) for name, x in output.items()})

    def _may_record(self, asked: Any, device: torch.device) -> bool:
        return asked not in self.refused and may_record(self.tower.modules(), device, "lvlm_fix.recorder")

    @contextmanager
    def _reading_apart(self) -> Iterator[None]:
        """Within, the recorder begins anew."""
        before = None if self.recorder is None else self.recorder.take()
        try:
            yield
        finally:
            if self.recorder is not None and before is not None:
                self.recorder.clear()  # of what broke off
                self.recorder.give(before)

    def _with_what_is_read(self, forward: Callable, **inputs: Any) -> tuple[Any, Any]:
        output = forward(**inputs)
        return output, None if self.recorder is None else self.recorder.take()
