"""`lvlm-fix bench`: what the methods cost, or save, in time and memory."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

DEFAULT_FIX = ("var", "damro", "vtc_cls(keep=0.1112)", "zipvl", "damro,var,vtc_cls(keep=0.1112),zipvl")


def bench(
    model: Annotated[
        str,
        typer.Option(
            help="'embedded', a local folder or a hub id; or random:tiny, random:llava-1.5-7b, random:llava-next-7b, "
            "true architectures with random weights, for timing only."
        ),
    ] = "embedded",
    fix: Annotated[
        list[str] | None,
        typer.Option(
            help="Methods of one setting, such as 'damro(alpha=1.0),vtc_cls'; repeat for more. Plain always runs."
        ),
    ] = None,
    reference: Annotated[
        bool,
        typer.Option(
            "--reference", help="Also the methods' reference formulas, restated: eager, two passes."
        ),
    ] = False,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Also the settings with compile=True, and compiled plain.")
    ] = False,
    compile_plain: Annotated[
        bool,
        typer.Option(help="Whether --compile includes plain, by torch.compile over a static KV cache."),
    ] = True,
    peer: Annotated[
        str | None, typer.Option(help="mitigv: its VCD, M3ID and ICD, one picture, natural prompt.")
    ] = None,
    peer_python: Annotated[
        str | None, typer.Option(help="Interpreter that has the peer. [default: this one]")
    ] = None,
    batch_size: Annotated[str, typer.Option(help="Prompts at once; several as 1,4.")] = "1",
    prompt_tokens: Annotated[
        str | None, typer.Option(help="Tokens of the prompt, the picture's included; several as 200,800.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of every answer.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 9,
    clock: Annotated[
        str,
        typer.Option(
            help="wall, or cpu: seconds that this process was given, for a machine that others use."
        ),
    ] = "wall",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of torch on the CPU. [default: torch's]")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. [default: the GPU, if there is one]")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Such as float16; 'auto' is the checkpoint's own.")] = "auto",
    json_: Annotated[
        Path | None, typer.Option("--json", help="Write everything to this file, - for stdout.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the ratios to plain there, as a PNG.")] = None,
) -> None:
    """Time plain and fixed generation in turns: first token, each token, memory, and their ratios to plain."""
    for path in (json_, plot):
        if path is not None and str(path) != "-" and not path.absolute().parent.is_dir():
            raise OSError(f"cannot write {path}: there is no folder {path.parent}; make it first")
    sizes, lengths = _numbers(batch_size, "--batch-size"), _numbers(prompt_tokens, "--prompt-tokens")
    if clock not in ("wall", "cpu"):
        raise ValueError(f"there is no clock {clock!r}: give wall or cpu")
    from lvlm_fix.commands.describe import _progress, _quietly
    from lvlm_fix.methods import parse

    settings = {text: tuple(parse(text)) for text in fix or DEFAULT_FIX}
    if peer is not None:
        from lvlm_fix.benchmark_peer import interpreter

        interpreter(peer, peer_python)
    with _progress(f"loading {model}") as show:
        import torch

        from lvlm_fix.benchmark_models import subject
        from lvlm_fix.benchmark_result import measured

        if compile_:  # of graph breaks in the plain model's own prefill nobody can do anything
            for name in ("torch._dynamo", "torch.utils.cpp_extension"):
                logging.getLogger(name).setLevel(logging.ERROR)
        if threads is not None:
            torch.set_num_threads(threads)
        chosen = subject(_quietly(model), device, dtype)
        result = measured(
            chosen,
            settings,
            sizes or [1],
            lengths or [None],
            new_tokens=new_tokens,
            rounds=rounds,
            clock=clock,
            reference=reference,
            compiled=compile_,
            compiled_plain=compile_ and compile_plain,
            show=show,
        )
        if peer is not None:
            from lvlm_fix.benchmark_peer import peer_times

            show(f"timing {peer}")
            result["peer"] = {"name": peer} | peer_times(peer, peer_python, chosen, new_tokens, rounds, clock)
    if plot is not None:
        from lvlm_fix.benchmark_plot import draw

        draw(result, plot)
    if json_ is not None and str(json_) == "-":
        print(json.dumps(result, indent=2))
        return
    if json_ is not None:
        json_.write_text(json.dumps(result, indent=2) + "\n")
    _print(result)


def _numbers(text: str | None, option: str) -> list[int]:
    try:
        numbers = [int(part) for part in (text or "").split(",") if part.strip()]
    except ValueError:
        numbers = [0]
    if any(number < 1 for number in numbers):
        raise ValueError(f"cannot read {option} {text!r}: write whole numbers from 1, such as 1,4")
    return numbers


def _print(result: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:  # in a file a table need not fit 80 columns
        console = Console(markup=False, emoji=False, highlight=False, width=160)
    machine = result["machine"]
    console.print(
        f"{result['model']} ({result['dtype']}) on {machine['device']}, {machine['threads']} threads, "
        f"{result['new_tokens']} tokens, {result['clock']} clock; medians [quartiles], ratios to plain"
    )
    for case in result["cases"]:
        table = Table(
            title=f"batch of {case['batch_size']}, prompt of {case['prompt_tokens']} tokens",
            box=box.SIMPLE,
            padding=(0, 1, 0, 0),
        )
        table.add_column("setting", overflow="fold", min_width=16)
        for heading in ("first token", "each token", "whole answer", "tokens/s", "KV bytes", "peak MiB"):
            table.add_column(heading)
        for name, entry in case["settings"].items():
            table.add_row(name, *_cells(entry))
        console.print(table)
        for name, told in case["encoding"].items():
            console.print(f"{name}: encoding a picture takes {_spread(told['ratio'], '.2f')} of plain")
            console.print(f"{name}: CLS scoring takes {_spread(told['scoring'], '.1%')} of plain encoding")
            if not name.startswith("compiled: "):  # there it is what replaying saves
                console.print(
                    f"{name}: attaching takes {_spread(told['attaching'], '.1%')} of it, whatever is read"
                )
        if case["first_compiled_run"]:
            longest = max(case["first_compiled_run"].values())
            console.print(
                f"the first run of each that is compiled took up to {longest:.0f} s and is not counted"
            )
    if "peer" in result:
        table = Table(title=f"{result['peer']['name']} against its own plain, one picture")
        for heading in ("method", "first token x", "each token x", "answer x"):
            table.add_column(heading)
        for name, entry in result["peer"]["settings"].items():
            table.add_row(
                name, *(f"{entry['ratios'][key]:.2f}" for key in ("first_token", "token", "answer"))
            )
        console.print(table)


def _cells(entry: dict[str, Any]) -> list[str]:
    kept = entry["ratios"].get("kv_bytes")
    return [
        *(_timed(entry, measure) for measure in ("first_token", "token", "answer")),
        f"{entry['tokens_per_second']['median']:.1f}",
        "" if kept is None else f"{kept:.2f}x",
        "" if entry["peak"] is None else f"{entry['peak'] / 2**20:.0f}",
    ]


def _timed(entry: dict[str, Any], measure: str) -> str:
    """Milliseconds, and the ratio to plain with its quartiles."""
    return f"{entry[measure]['median'] * 1e3:.4g} ms {_spread(entry['ratios'][measure], '.2f', 'x')}"


def _spread(of: dict[str, float], form: str, unit: str = "") -> str:
    """A median and its quartiles."""
    return f"{of['median']:{form}}{unit} [{of['low']:{form}}, {of['high']:{form}}]"
