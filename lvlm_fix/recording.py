"""Parts of a model on a GPU as CUDA graphs: recorded when the same is asked for the second time, replayed after that.

Where few rows are computed, the host is what takes time: it queues some thousand small operations. A CUDA graph queues
them at once, but its addresses and sizes never change, while a KV cache grows and the methods do with it as they like.
So a recording can stop, at each layer's attention, and go on behind it: attention is queued anew each time, just as
without a recording, and all else is replayed. These are the same kernels, so every bit is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lvlm_fix.errors import UnsupportedModelError

MOST = 16
"""Recordings kept of a part, one for all that is of the same size: the one that was longest of no use goes first."""

Attend = Callable[..., Tensor]
"""Called with the tensors of a stop, (query, key, value, hidden states), the last of which may be None."""


class Stop(NamedTuple):
    """Where a recording stops: what a layer's attention is made from, and where its output goes."""

    attend: Attend
    given: tuple[Tensor | None, ...]
    output: Tensor


class Recording:
    """The graphs of a function; while it is recorded, it is computed as well."""

    def __init__(self, where: tuple[Any, torch.cuda.Stream], sharing: bool = False) -> None:
        """Prepare to record in a memory pool of torch's graphs, from a stream on which nothing ever runs.

        With `sharing`, all stops use the same memory: a copy each, and that of one layer instead of all.
        """
        self.given: dict[str, Tensor] = {}
        self.output: Any = None
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.stops: list[Stop] = []
        self.shared: dict[Any, Tensor] | None = {} if sharing else None
        self.pool, self.recorded_stream = where
        # Graphs and attention take their turns on this one.
        self.stream = torch.cuda.current_stream()
        self.is_open = False

    def record(self, what: str, function: Callable, inputs: dict[str, Any]) -> None:
        """Run `function` of `inputs`, whose tensors are given anew when it is replayed; `what` it is, errors tell.

        Raises:
            UnsupportedModelError: the model does what cannot be recorded, such as asking the device for a number.
        """
        self.given = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
        with torch.cuda.stream(self.recorded_stream):
            try:
                self._begin()
                self.output = function(**inputs | self.given)
                self._end()
            except BaseException as error:
                if not self.is_open:
                    raise
                with suppress(RuntimeError):  # the first error tells more than that of ending what it broke
                    self.graphs[-1].capture_end()
                if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
                    raise
                why = str(error).partition("\n")[0]  # CUDA says where to look it up, too
                raise UnsupportedModelError(
                    f"compile=True cannot record this model's {what} as CUDA graphs ({why}): leave it out"
                ) from error

    def stop(self, attend: Attend, *given: Tensor | None) -> Tensor:
        """Attention in the middle of a recording."""
        given = tuple(self._kept(place, x) for place, x in enumerate(given))
        self._end()
        with torch.cuda.stream(self.stream):
            made = attend(*given)
            output = made.clone() if self.shared is None else self._kept("output", made)
        assert output is not None
        self.stops.append(Stop(attend, given, output))
        self._begin()
        return output

    def _kept(self, place: Any, x: Tensor | None) -> Tensor | None:
        if x is None or self.shared is None:
            return x
        held = self.shared.get(place)
        if held is None or held.shape != x.shape or held.stride() != x.stride():
            held = self.shared[place] = torch.empty_like(x)
        return held.copy_(x)

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # Graphs share their memory, for they run one after the other. Other threads may go on using the GPU.
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        self.graphs.append(graph)
        self.is_open = True

    def _end(self) -> None:
        self.is_open = False
        self.graphs[-1].capture_end()
        with torch.cuda.stream(self.stream):
            self.graphs[-1].replay()

    def replay(self, inputs: dict[str, Any]) -> None:
        """The same of other `inputs` of the same sizes; `output` is then theirs."""
        for name, held in self.given.items():
            held.copy_(inputs[name])
        for graph, stop in zip(self.graphs, self.stops, strict=False):
            graph.replay()
            stop.output.copy_(stop.attend(*stop.given))
        self.graphs[-1].replay()


class Recordings:
    """Those of one part of a model, by what is asked; None until it is recorded."""

    def __init__(self, what: str, sharing: bool = False) -> None:
        self.what, self.sharing = what, sharing
        self.where: Any = None
        self.known: dict[Any, Recording | None] = {}

    def clear(self) -> None:
        """Give the memory back."""
        self.known.clear()
        self.where = None

    def next(self, asked: Any, may_record: Callable[[], bool]) -> Recording | None:
        """What is to be replayed or, where it has no graphs yet, recorded now; None to go without."""
        is_new = asked not in self.known
        recording = self.known.pop(asked, None)
        if recording is None and not is_new and may_record():
            # In their first run libraries set themselves up, which cannot be recorded.
            # What one leaves behind has been copied before another is replayed.
            self.where = self.where or (torch.cuda.graph_pool_handle(), torch.cuda.Stream())
            recording = Recording(self.where, self.sharing)
        while len(self.known) >= MOST:
            self.known.pop(next(iter(self.known)))
        self.known[asked] = recording
        return recording

    def output(self, recording: Recording, asked: Any, function: Callable, inputs: dict[str, Any]) -> Any:
        """What `function` says to `inputs`, in memory that the next replay writes to."""
        if recording.graphs:
            recording.replay(inputs)
            return recording.output
        try:
            recording.record(self.what, function, inputs)
        except BaseException:
            # Of memory and stream that a recording broke off in, nothing is known.
            self.known[asked] = self.where = None
            raise
        return recording.output


def replays(model: nn.Module) -> bool:
    """Whether a model is all on one GPU, and so can be recorded."""
    places = {parameter.device for parameter in model.parameters()}
    return len(places) == 1 and places.pop().type == "cuda"


def asked_of(inputs: dict[str, Any], device: torch.device) -> tuple[Any, ...]:
    """What a recording is made for: tensors by their sizes, all else by what it is."""
    kinds = {
        name: (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else repr(value)
        for name, value in inputs.items()
    }
    modes = torch.is_inference_mode_enabled(), torch.is_autocast_enabled(device.type)
    return *modes, *sorted(kinds.items())


def may_record(modules: Iterable[nn.Module], device: torch.device, known: str) -> bool:
    """Whether a graph would do all that these modules do; hooks of the module `known` may be there."""
    if torch.is_autocast_enabled(device.type):
        return (
            False  # it keeps weights that it has cast until it ends, and a graph would read them after that
        )
    hooks = (hook for x in modules for hook in (*x._forward_hooks.values(), *x._forward_pre_hooks.values()))
    # A graph calls no hooks. transformers' own hand out hidden states, which nobody asks for here.
    return all((getattr(hook, "__module__", "") or "").startswith(("transformers.", known)) for hook in hooks)


def own(value: Any) -> Any:
    """The same in memory that no replay writes to: of what models return, and lists and tuples of tensors."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list | tuple):
        return type(value)([own(one) for one in value])
    if isinstance(value, dict):
        return type(value)(**{name: own(one) for name, one in value.items()})
    return value
