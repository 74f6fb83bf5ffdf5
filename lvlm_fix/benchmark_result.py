"""A whole benchmark as plain numbers, with what it was measured on."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lvlm_fix.benchmark import (
    CLOCKS,
    Contestant,
    Stopwatch,
    compete,
    encoding,
    fixed,
    plain,
    plain_compiled,
    summary,
)
from lvlm_fix.benchmark_models import Subject, inputs_of
from lvlm_fix.benchmark_reference import reference as by_reference
from lvlm_fix.errors import PremiseWarning
from lvlm_fix.methods import DAMRO, VTCCLS, Method, ZipVL
from lvlm_fix.recording import replays

LIBRARIES = ("lvlm-fix", "torch", "transformers", "triton", "numpy")
PLAIN = "plain"


def measured(
    subject: Subject,
    settings: Mapping[str, tuple[Method, ...]],
    batch_sizes: Sequence[int],
    prompt_tokens: Sequence[int | None],
    *,
    new_tokens: int,
    rounds: int,
    clock: str,
    reference: bool = False,
    compiled: bool = False,
    compiled_plain: bool = False,
    show: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Time plain and every setting for each batch size and prompt length.

    Args:
        subject: model to time.
        settings: methods by name.
        batch_sizes, prompt_tokens: every pair is a case; None is the prompt as it is.
        new_tokens, rounds, clock: see `compete`.
        reference: also time the reference formulas of the settings that have some.
        compiled: also time every setting with compiled decoding steps.
        compiled_plain: also time plain with steps that `torch.compile` made over a static KV cache.
        show: told what is going on.

    Raises:
        ValueError: see `compete`, `inputs_of` and `reference`.
    """
    model, cases = subject.model, []
    scored = {
        name: methods for name, methods in settings.items() if {DAMRO, VTCCLS} & set(map(type, methods))
    }
    for rows in batch_sizes:
        for length in prompt_tokens:
            inputs = inputs_of(subject, rows, length)
            contestants = _contestants(model, inputs, settings, reference)
            late: dict[str, Contestant] = {}
            if compiled_plain:
                late[f"compiled: {PLAIN}"] = functools.partial(plain_compiled, model, inputs)
            if compiled:
                late |= _compiled(model, inputs, settings)
            first = {}
            for name, contestant in late.items():
                show(f"compiling {name}, batch of {rows}")
                first[name] = _first_run(contestant, new_tokens)
            contestants |= late
            show(f"timing {len(contestants)} settings, batch of {rows}")
            with warnings.catch_warnings():
                # What is timed is not whether a method helps.
                warnings.simplefilter("ignore", PremiseWarning)
                runs = compete(contestants, new_tokens, rounds, clock, model.device)
                encode = functools.partial(encoding, model, inputs, rounds=6 * rounds, clock=clock)
                encodings = {name: encode(methods) for name, methods in scored.items()}
                if compiled and replays(model):  # elsewhere compile=True leaves the encoding alone
                    encodings |= {
                        f"compiled: {name}": encode(methods, compile=True) for name, methods in scored.items()
                    }
            cases.append(
                {
                    "batch_size": rows,
                    "prompt_tokens": inputs["input_ids"].shape[1],
                    "settings": summary(runs, rows, PLAIN),
                    "encoding": encodings,
                    "first_compiled_run": first,
                }
            )
    return {
        "model": subject.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "new_tokens": new_tokens,
        "rounds": rounds,
        "clock": clock,
        "machine": machine(model.device),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in LIBRARIES},
        "cases": cases,
    }


def _contestants(
    model: Any, inputs: Mapping[str, Any], settings: Mapping[str, tuple[Method, ...]], reference: bool
) -> dict[str, Contestant]:
    made: dict[str, Contestant] = {PLAIN: functools.partial(plain, model, inputs)}
    for name, methods in settings.items():
        if methods:
            made[name] = functools.partial(fixed, model, inputs, methods)
        # ZipVL's reference code is not public.
        if reference and methods and not any(isinstance(method, ZipVL) for method in methods):
            made[f"reference: {name}"] = functools.partial(by_reference, model, inputs, methods)
    return made


def _compiled(
    model: Any, inputs: Mapping[str, Any], settings: Mapping[str, tuple[Method, ...]]
) -> dict[str, Contestant]:
    return {
        f"compiled: {name}": functools.partial(fixed, model, inputs, methods, compile=True)
        for name, methods in settings.items()
        if methods
    }


def _first_run(contestant: Contestant, new_tokens: int) -> float:
    """Seconds of an answer in which whatever there is to compile is compiled."""
    start = time.perf_counter()
    with warnings.catch_warnings(), contestant() as generate, torch.inference_mode():
        warnings.simplefilter("ignore", PremiseWarning)
        generate(new_tokens, Stopwatch(CLOCKS["wall"]))
    return time.perf_counter() - start


def machine(device: torch.device) -> dict[str, Any]:
    """What was measured on, and how busy it was."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "device": name,
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": load,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()  # not Linux
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None  # triton is not everywhere
