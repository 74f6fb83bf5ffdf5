"""A decoding step on a GPU as CUDA graphs: what the model does between two attentions, recorded once and replayed.

A step of few rows is bound by the host, which queues some thousand small operations for every token. A CUDA graph
queues them at once, but its addresses and sizes never change, while a KV cache grows and the methods do with it as they
like. So a recording stops at each layer's attention and goes on behind it: attention is queued anew for every token,
just as an unrecorded step does it, and all else is replayed. These are the same kernels, so every bit is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from lvlm_fix.attention import MethodAttention
from lvlm_fix.cache import BranchedCache, OutOfSight
from lvlm_fix.errors import UnsupportedModelError
from lvlm_fix.kernels.fused.launch import on_device_of
from lvlm_fix.passes import Pass

IMPLEMENTATION = "lvlm_fix_replayed"
"""What a model's configuration names while a step is recorded."""

MOST = 16
"""Recordings kept, one for each number of rows: the oldest goes first."""

OPTIONS = ("scaling", "sliding_window", "softcap", "s_aux")
"""Of what a layer passes to attention, what a step here must know."""


class Stop(NamedTuple):
    """Where a recording stops: a layer's attention of (R, H, 1, D) and (R, Hkv, 1, D), and where its output goes."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor


class Recording:
    """The graphs of one step; while it is recorded, the step is made as well."""

    def __init__(self) -> None:
        self.given: dict[str, Tensor] = {}
        self.output: Any = None
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.stops: list[Stop] = []
        self.pool = torch.cuda.graph_pool_handle()
        # Nothing ever runs on the stream that is recorded from: graphs and attention take their turns on this one.
        self.stream = torch.cuda.current_stream()
        self.is_open = False

    def record(self, forward: Callable, inputs: dict[str, Any]) -> None:
        """Run `forward` of `inputs`, whose tensors later steps give anew.

        Raises:
            UnsupportedModelError: the model does what cannot be recorded, such as asking the device for a number.
        """
        self.given = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
        with torch.cuda.stream(torch.cuda.Stream()):
            try:
                self._begin()
                self.output = forward(**inputs | self.given)
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
                    f"compile=True cannot record this model's decoding step as CUDA graphs ({why}): leave it out"
                ) from error

    def stop(self, attend: Callable, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention in the middle of a recording."""
        self._end()
        with torch.cuda.stream(self.stream):
            output = attend(query, key, value).clone()
        self.stops.append(Stop(attend, query, key, value, output))
        self._begin()
        return output

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # All graphs share their memory, for they run one after the other. Other threads may go on using the GPU.
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        self.graphs.append(graph)
        self.is_open = True

    def _end(self) -> None:
        self.is_open = False
        self.graphs[-1].capture_end()
        with torch.cuda.stream(self.stream):
            self.graphs[-1].replay()

    def replay(self, inputs: dict[str, Any]) -> None:
        """The step of other `inputs` of the same sizes; `output` is then theirs."""
        for name, held in self.given.items():
            held.copy_(inputs[name])
        for graph, stop in zip(self.graphs, self.stops, strict=False):
            graph.replay()
            stop.output.copy_(stop.attend(stop.query, stop.key, stop.value))
        self.graphs[-1].replay()

    def said(self) -> Any:
        """The step's output, in memory that the next one does not write to."""
        own = {name: x.clone() if isinstance(x, Tensor) else x for name, x in self.output.items()}
        return type(self.output)(**own)


_RUNNING: ContextVar[tuple[MethodAttention, Recording | None]] = ContextVar("lvlm_fix_replayed_attention")


class ReplayedStep:
    """`plain_forward` for one new token a row, of a model on one GPU; recorded when it runs for the second time."""

    def __init__(self, plain_forward: Callable, attention: MethodAttention) -> None:
        self.forward, self.attention = plain_forward, attention
        # By what is asked; None until it is recorded.
        self.recordings: dict[Any, Recording | None] = {}

    def __call__(self, this: Pass, cache: BranchedCache, inputs: dict[str, Any]) -> Any:
        """What `plain_forward` says to `inputs`, which the pass `this` tells the rest of."""
        inputs = inputs | {"attention_mask": None}
        asked, through_model = _asked(inputs), inputs | {cache.name: OutOfSight()}
        with (
            on_device_of(inputs["input_ids"]),
            torch.no_grad(),
            self.attention.running(this),
            cache.attached(),
        ):
            recording = self.recordings.get(asked)
            if recording is not None:
                recording.replay(inputs)
                output = recording.said()
            elif asked in self.recordings and self._may_record(inputs["input_ids"].device):
                recording = Recording()
                with self._stopping(recording):
                    recording.record(self.forward, through_model)
                self.recordings[asked] = recording
                output = recording.said()
            else:
                # In their first run libraries set themselves up, which cannot be recorded.
                with self._stopping(None):
                    output = self.forward(**through_model)
                while len(self.recordings) >= MOST:
                    self.recordings.pop(next(iter(self.recordings)))
                self.recordings[asked] = None
        output[cache.name] = cache
        return output

    def _may_record(self, device: torch.device) -> bool:
        if torch.is_autocast_enabled(device.type):
            return False  # it keeps weights that it has cast until it ends, and a graph would read them after that
        modules = (module for layer in self.attention.decoder_layers for module in layer.modules())
        hooks = (
            hook for x in modules for hook in (*x._forward_hooks.values(), *x._forward_pre_hooks.values())
        )
        # A graph calls no hooks. transformers' own hand out hidden states, which nobody asks for here.
        return all((getattr(hook, "__module__", "") or "").startswith("transformers.") for hook in hooks)

    @contextmanager
    def _stopping(self, recording: Recording | None) -> Iterator[None]:
        """Within, the decoder's layers attend by `_attention`."""
        token = _RUNNING.set((self.attention, recording))
        try:
            with self.attention.interception.replaced_by(IMPLEMENTATION):
                yield
        finally:
            _RUNNING.reset(token)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **options: Any
) -> tuple[Tensor, None]:
    attention, recording = _RUNNING.get()
    known: dict[str, Any] = {name: options.get(name) for name in OPTIONS}
    attend = partial(attention.attend_next, attention.index[id(module)], **known)
    return (attend if recording is None else partial(recording.stop, attend))(query, key, value), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Attention masks by itself."""


def _asked(inputs: dict[str, Any]) -> tuple[Any, ...]:
    """What a recording is made for: tensors by their sizes, all else by what it is."""
    kinds = {
        name: (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else repr(value)
        for name, value in inputs.items()
    }
    place = inputs["input_ids"].device.type
    modes = torch.is_inference_mode_enabled(), torch.is_autocast_enabled(place)
    return *modes, *sorted(kinds.items())


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
