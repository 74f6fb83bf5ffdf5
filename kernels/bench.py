"""Time every front against torch, against the papers' formulas, and against what the machine could do at best.

    python -m lvlm_fix.kernels.bench                     # every kernel and shape, on CUDA if there is one
    python -m lvlm_fix.kernels.bench --kernel visual_attention --shape next --dtype bfloat16 --json times.json
    python -m lvlm_fix.kernels.bench --quick             # a minute on two processor cores

The floor of a case is the longer of its bytes over the machine's copy bandwidth and its FLOPs over its rate at a
large matrix product, both measured in the same run: no implementation of exact attention can be faster for long.
On CUDA, time is that of the GPU alone, and wall time is what a call takes the caller, launches included.

That the kernels are right on a GPU is another command (see tests/interpreted/conftest.py):

    LVLM_FIX_GPU=1 CUDA_VISIBLE_DEVICES=0 CUBLAS_WORKSPACE_CONFIG=:4096:8 pytest tests/interpreted/*.py
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lvlm_fix.kernels.dispatch import last_used
from lvlm_fix.kernels.timing import Clock, free_bytes, machine, measured_rates
from lvlm_fix.kernels.workloads import CASES, SAME_FOR_ALL_SHAPES, SHAPES, WIDTH, Size, Workload, heads_within

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
COLUMNS = (
    "kernel",
    "shape",
    "heads",
    "case",
    "ran",
    "time",
    "wall time",
    "against torch",
    "against reference",
    "of the floor",
)
# An n x n reference holds its weights about so many times at once: logits, softmax, masks, products.
COPIES = 6


def measure(
    case: Callable[[Size], Workload], kernel: str, size: Size, clock: Clock, budget: float
) -> dict[str, Any]:
    """One row of the result: spreads of the front, of torch and of the reference, and their ratios."""
    torch.manual_seed(0)
    work = case(size)
    forms = {"front": work.front, "peer": work.peer}
    needed, free = COPIES * work.reference_bytes, free_bytes(size.device)
    if needed <= free / 2:
        forms["reference"] = work.reference
    spreads = clock.compare(forms, budget)
    implementation = last_used()[kernel]
    front = spreads["front"].median
    row: dict[str, Any] = {
        "case": work.case,
        "heads": work.heads,
        "implementation": implementation,
        "front": asdict(spreads["front"]),
        "wall_seconds": clock.wall_seconds(work.front, calls=10 if size.device.type == "cuda" else 1),
        "peer": asdict(spreads["peer"]) | {"name": work.peer_name},
        "speed_over_peer": spreads["peer"].median / front,
        "bytes": work.bytes_moved,
        "flops": work.flops,
    }
    if "reference" in spreads:
        row["reference"] = asdict(spreads["reference"])
        row["speed_over_reference"] = spreads["reference"].median / front
        row["difference"] = difference(work.front(), work.reference())
    else:
        row["reference"] = {"left_out": f"needs {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB free"}
    return row


def difference(out: Any, reference: Any) -> float | None:
    """||out - reference|| / ||reference|| of finite elements; None for packed tensors."""
    if isinstance(out, tuple):
        out, reference = out[0], reference[0]
    if not isinstance(out, Tensor):
        return None
    finite = reference.isfinite()
    out, reference = out[finite].double(), reference[finite].double()
    return float((out - reference).norm() / reference.norm())


def against_floor(row: dict[str, Any], rates: dict[str, Any]) -> dict[str, Any]:
    """The row with its floor: seconds, what sets it, and which share of the front's time it is."""
    by = {
        "bytes": row["bytes"] / rates["bytes_per_second"],
        "flops": row["flops"] / rates["flops_per_second"],
    }
    limit = max(by, key=lambda name: by[name])
    return row | {
        "floor": {"seconds": by[limit], "set_by": limit, "share": by[limit] / row["front"]["median"]}
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All cases that were asked for, as the JSON file holds them."""
    device = torch.device(options.device)
    dtype = DTYPES[options.dtype]
    clock = Clock(device)
    found = machine(device, options.machine)
    rates = measured_rates(clock, dtype, options.quick)
    rows = [against_floor(row, rates) if "front" in row else row for row in measured(options, clock, dtype)]
    settings = {"dtype": options.dtype, "device": device.type, "quick": options.quick, "date": options.date}
    return {"machine": found, "rates": rates, "settings": settings, "results": rows}


def measured(options: argparse.Namespace, clock: Clock, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    on_gpu = clock.device.type == "cuda"
    arithmetic = float("inf") if on_gpu else 2e9 if options.quick else 2e10
    seconds = 0.2 if options.quick else 1.0
    for kernel in options.kernel or CASES:
        for case in CASES[kernel]:
            for shape in options.shape or SHAPES:
                tokens = SHAPES[shape]
                heads = heads_within(case, tokens, arithmetic)
                anywhere = case in SAME_FOR_ALL_SHAPES
                row: dict[str, Any] = {"kernel": kernel, "shape": "any" if anywhere else shape}
                row |= {"tokens": None if anywhere else tokens, "heads": heads}
                if heads:
                    print(f"{kernel}, {shape}", file=sys.stderr)
                    row |= measure(case, kernel, Size(tokens, heads, dtype, clock.device), clock, seconds)
                else:
                    row |= {"left_out": "too much arithmetic for a processor, also with one head"}
                yield row
                if anywhere:
                    break


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table; times with their quartiles."""
    shape = f"{row['shape']}, {row['tokens']:,}" if row["tokens"] else row["shape"]
    begin = [row["kernel"], shape, str(row["heads"] or "")]
    if "left_out" in row:
        return [*begin, "", "", row["left_out"], "", "", "", ""]
    reference = row["reference"]
    return [
        *begin,
        row["case"],
        row["implementation"],
        spelled(row["front"]),
        in_unit(row["wall_seconds"]),
        f"{row['speed_over_peer']:.2f}x {row['peer']['name']}",
        f"{row['speed_over_reference']:.1f}x" if "median" in reference else reference["left_out"],
        f"{row['floor']['share']:.2f} ({row['floor']['set_by']})",
    ]


def in_unit(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def spelled(spread: dict[str, Any]) -> str:
    unit, factor = ("ms", 1e3) if spread["median"] >= 1e-3 else ("us", 1e6)
    median, lower, upper = (f"{spread[name] * factor:.3g}" for name in ("median", "lower", "upper"))
    return f"{median} {unit} [{lower}, {upper}]"


def caption(result: dict[str, Any]) -> str:
    """What the numbers are, in a sentence or two."""
    found, rates, settings = (result[name] for name in ("machine", "rates", "settings"))
    load = "" if found["load"] is None else f", load {found['load']} before the run"
    day = f", {settings['date']}" if settings["date"] else ""
    threads = "" if settings["device"] == "cuda" else f", {found['threads']} of {found['cores']} cores"
    return (
        f"{found['name']}{threads}{load}{day}; torch {found['versions']['torch']}, {settings['dtype']}, batch 1, "
        f"head size {WIDTH}{', --quick' if settings['quick'] else ''}. Copy {rates['bytes_per_second'] / 1e9:.3g} "
        f"GB/s, matrix product {rates['flops_per_second'] / 1e12:.3g} TFLOP/s. Medians with quartiles; above 1x the "
        "front is faster; of the floor, 1 is the most that can be had, but by data that stays in a processor's cache."
    )


def markdown(result: dict[str, Any]) -> str:
    lines = [caption(result), "", f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(cells(row))} |" for row in result["results"]]
    return "\n".join(lines) + "\n"


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m lvlm_fix.kernels.bench",
        description="Time the kernels against torch, the reference formulas and the machine's floor.",
    )
    parser.add_argument("--kernel", action="append", choices=CASES, help="may be repeated; all if left out")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="may be repeated; all if left out")
    parser.add_argument("--dtype", choices=DTYPES, default="float16" if gpu else "float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument(
        "--quick", action="store_true", help="fewer repetitions, and fewer heads on a processor"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table here")
    parser.add_argument(
        "--machine", help="the machine's name in the results; its processor or GPU if left out"
    )
    parser.add_argument("--date", help="the day to note in the results; none if left out")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not gpu:
        parser.error("torch sees no CUDA device here; run with --device cpu")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    with torch.inference_mode():
        result = run(options)
    table = Table(*COLUMNS, caption=caption(result), caption_justify="left")
    for row in result["results"]:
        table.add_row(*cells(row))
    console = Console()
    # Piped to a file, a table must not be cut to 80 columns.
    Console(width=None if console.is_terminal else 220).print(table)
    for path, text in (
        (options.json, json.dumps(result, indent=1) + "\n"),
        (options.markdown, markdown(result)),
    ):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


if __name__ == "__main__":
    main()
