"""How long generation takes, plain and with methods: timed in turns, so that a machine's drift is shared by all."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from lvlm_fix.attachment import Attachment
from lvlm_fix.cache import NAMES
from lvlm_fix.encoding import skipping
from lvlm_fix.methods import Method
from lvlm_fix.methods.zipvl import ZipVL
from lvlm_fix.models import family_of

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""`cpu` counts the seconds that this process was given: on a machine that others use, wall time also counts theirs."""

PICTURES = 3
"""Of one turn, behind those that warm up: whoever serves a model attaches once. A few, as machines drift within ten."""

WARM_UPS = 2
"""Answers before the one that counts: what is recorded is so when it is asked for the second time."""

Generate = Callable[..., Any]
"""Called as (new_tokens, streamer); returns what `generate` does: `sequences`, and the KV cache by one of its names."""


@dataclass(frozen=True)
class Run:
    """One answer: seconds to its first token, to each further one, and in all; bytes; `peak` where it is known."""

    first: float
    steps: list[float]
    total: float
    kv_bytes: int | None
    peak: int | None


class Stopwatch:
    """A streamer of transformers that only looks at the clock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.times = clock, [clock()]

    def put(self, value: Tensor) -> None:
        self.times.append(self.clock())

    def end(self) -> None:
        """Nothing is left to print."""


@contextmanager
def plain(model: Any, inputs: Mapping[str, Any], **options: Any) -> Iterator[Generate]:
    """`model.generate`, greedy and with further `options`, never shorter than asked for.

    Without a `generation_config`, generate builds and checks a default one for each answer, which on a slow host takes
    half as long as a large model's first token.
    """

    @functools.cache
    def config(new_tokens: int) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
            **options,
        )

    def generate(new_tokens: int, streamer: Any) -> Any:
        return model.generate(**inputs, generation_config=config(new_tokens), streamer=streamer)

    yield generate


@contextmanager
def fixed(
    model: Any, inputs: Mapping[str, Any], methods: tuple[Method, ...], compile: bool = False
) -> Iterator[Generate]:
    """The same with methods attached."""
    with Attachment(model, methods, compile=compile), plain(model, inputs) as generate:
        yield generate


@contextmanager
def plain_compiled(model: Any, inputs: Mapping[str, Any]) -> Iterator[Generate]:
    """`plain` as transformers' guide compiles it: a static KV cache, and `torch.compile` over the forward pass."""
    compiled = torch.compile(model.forward)
    with plain(model, inputs, cache_implementation="static") as generate:
        model.forward = compiled
        try:
            yield generate
        finally:
            del model.forward


Contestant = Callable[[], AbstractContextManager[Generate]]


def compete(
    contestants: Mapping[str, Contestant],
    new_tokens: int,
    rounds: int,
    clock: str = "wall",
    device: torch.device | None = None,
) -> dict[str, list[Run]]:
    """Time all contestants in turns, `rounds` times, each warmed up by answers of two tokens that do not count.

    Args:
        contestants: by name, what makes the answer; entered anew for every turn, so that nothing is left on the model.
        new_tokens: length of every answer, at least 2.
        rounds: turns of each; the order turns with the rounds, so that nobody always follows the same one.
        clock: `wall` or `cpu`, seconds.
        device: whose memory is watched; None for the CPU.

    Raises:
        ValueError: a number is too small, or the clock is unknown.
    """
    if new_tokens < 2 or rounds < 1 or clock not in CLOCKS:
        raise ValueError(
            f"cannot time {new_tokens} tokens in {rounds} rounds by the {clock} clock: "
            "give at least 2 tokens, 1 round, and the clock wall or cpu"
        )
    device = torch.device("cpu") if device is None else device
    runs: dict[str, list[Run]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            with contestants[name]() as generate, torch.inference_mode():
                for _ in range(WARM_UPS):
                    generate(2, Stopwatch(CLOCKS[clock]))
                runs[name].append(_run(generate, new_tokens, CLOCKS[clock], device))
    return runs


def _run(generate: Generate, new_tokens: int, clock: Callable[[], float], device: torch.device) -> Run:
    cuda = device.type == "cuda"
    wait = (lambda: torch.cuda.synchronize(device)) if cuda else (lambda: None)
    wait()
    reset = _reset_peak(device)
    watch = Stopwatch(clock)
    output = generate(new_tokens, watch)
    wait()
    total = clock() - watch.times[0]
    # generate shows a streamer the prompt before it begins
    times = watch.times[-new_tokens:]
    steps = [after - before for before, after in pairwise(times)]
    peak = _peak(device) if reset else None
    return Run(times[0] - watch.times[0], steps, total, cache_bytes(output), peak)


def cache_bytes(output: Any) -> int | None:
    """Bytes of the keys and values that an answer left, all branches and what packing adds included."""
    cache = next((held for name in NAMES if (held := getattr(output, name, None)) is not None), None)
    if cache is None:
        return None
    total = 0
    branches = [cache, *getattr(cache, "apart", [])]
    for layer in (layer for branch in branches for layer in branch.layers):
        packed = getattr(layer, "nbytes", None)
        total += layer.keys.nbytes + layer.values.nbytes if packed is None else packed
    return total


def _reset_peak(device: torch.device) -> bool:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False  # only Linux lets a process forget its highest memory, and not everywhere
    return True


def _peak(device: torch.device) -> int:
    """Bytes at the highest: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    )
    return {"median": middle, "low": low, "high": high}


def summary(runs: Mapping[str, Sequence[Run]], rows: int, base: str) -> dict[str, dict[str, Any]]:
    """By contestant: medians, quartiles and ratios to `base`; a ratio is the median of those of the same round."""
    found: dict[str, dict[str, Any]] = {}
    for name, own in runs.items():
        measures = {measure: [take(run) for run in own] for measure, take in _MEASURES.items()}
        reference = {measure: [take(run) for run in runs[base]] for measure, take in _MEASURES.items()}
        entry: dict[str, Any] = {measure: spread(values) for measure, values in measures.items()}
        entry["tokens_per_second"] = spread([rows * (len(run.steps) + 1) / run.total for run in own])
        for measure in ("kv_bytes", "peak"):
            values = [getattr(run, measure) for run in own]
            entry[measure] = None if None in values else int(statistics.median(values))
        entry["ratios"] = {
            measure: spread([a / b for a, b in zip(values, reference[measure], strict=True)])
            for measure, values in measures.items()
        }
        base_bytes = runs[base][0].kv_bytes
        if entry["kv_bytes"] is not None and base_bytes:
            entry["ratios"]["kv_bytes"] = entry["kv_bytes"] / base_bytes
        found[name] = entry
    return found


_MEASURES: dict[str, Callable[[Run], float]] = {
    "first_token": lambda run: run.first,
    "token": lambda run: statistics.median(run.steps),
    "answer": lambda run: run.total,
}


def encoding(
    model: Any,
    inputs: Mapping[str, Any],
    methods: tuple[Method, ...],
    rounds: int,
    clock: str,
    compile: bool = False,
) -> dict[str, dict[str, float]]:
    """What a picture's way through vision tower and projector costs under methods: medians and quartiles.

    `ratio` is to plain. `scoring` is the share of the plain time that reading CLS scores takes: attached, less the
    same attached with a method that reads none. `attaching` is what that one takes above the model without its unread
    layers, which attaching leaves out. With `compile`, both are attached so.
    """
    family = family_of(model)
    encoder, unread = family.encoder(model), family.unread_layers(model)
    own = {
        name: value
        for name, value in inputs.items()
        if name in ("pixel_values", "image_sizes", "image_grid_thw")
    }
    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "plain": nullcontext,
        "shortened": functools.partial(skipping, unread),
        "unscored": functools.partial(Attachment, model, (ZipVL(),), compile=compile),
        "attached": functools.partial(Attachment, model, methods, compile=compile),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    with torch.inference_mode():
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                with ways[name]():
                    times[name].append(
                        _encode(functools.partial(encoder.get_image_features, **own), model, clock)
                    )
    rounds_of = list(zip(*times.values(), strict=True))
    return {
        "ratio": spread([attached / plain for plain, _, _, attached in rounds_of]),
        "scoring": spread([(attached - unscored) / plain for plain, _, unscored, attached in rounds_of]),
        "attaching": spread([(unscored - short) / plain for plain, short, unscored, _ in rounds_of]),
    }


def _encode(encode: Callable[[], Any], model: Any, clock: str) -> float:
    """Seconds to encode a picture, the median of `PICTURES`."""
    times = []
    for _ in range(WARM_UPS + PICTURES):
        _wait(model.device)
        start = CLOCKS[clock]()
        encode()
        _wait(model.device)
        times.append(CLOCKS[clock]() - start)
    return statistics.median(times[WARM_UPS:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
