"""`lvlm-fix tune`: a method's hyper-parameters, chosen on some images and tested on others."""

from __future__ import annotations

import ast
import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lvlm_fix.commands.evaluate import (
    AsJson,
    BatchSize,
    ChairRule,
    DeviceMap,
    DoSample,
    Dtype,
    Images,
    Limit,
    MaxNewTokens,
    Model,
    NumBeams,
    Seeds,
    Split,
    Temperature,
    _decoding,
    _quiet,
    _shown,
)

if TYPE_CHECKING:
    from lvlm_fix.evals.tasks import Task


class TaskName(StrEnum):
    chair = "chair"
    pope = "pope"


def tune(
    method: Annotated[
        str, typer.Argument(help="One method; values in parentheses stay fixed, as 'damro(beta=0.2)'.")
    ],
    task: Annotated[TaskName, typer.Option(help="What the settings are compared on.")] = TaskName.chair,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            help="Values to try, such as 'keep=36,48,72'; repeat for more hyper-parameters. "
            "[default: what the paper tunes]"
        ),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="What the best is best in. [default: F1 of POPE, CHAIRi of CHAIR]")
    ] = None,
    recall_drop: Annotated[
        float,
        typer.Option(
            help="Points of recall that CHAIRi and CHAIRs may cost at most: saying less must not win."
        ),
    ] = 2.0,
    validation: Annotated[
        float, typer.Option(help="Share of the images to choose by; the others are the test part.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="Divides the images; first seed of sampling.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the results; the same goes on where it was.")] = Path(
        "tune"
    ),
    model: Model = "embedded",
    images: Images = None,
    annotations: Annotated[
        Path | None, typer.Option(help="COCO instances; of CHAIR also a folder. [default: embedded scenes]")
    ] = None,
    split: Annotated[
        list[Split] | None, typer.Option(help="Of POPE; repeat for more. [default: all three]")
    ] = None,
    questions: Annotated[
        list[Path] | None, typer.Option(help="POPE questions; repeat for more splits.")
    ] = None,
    rule: Annotated[ChairRule, typer.Option(help="Of CHAIR, how words are read.")] = ChairRule.english,
    limit: Limit = None,
    batch_size: BatchSize = 16,
    max_new_tokens: MaxNewTokens = None,
    seeds: Seeds = 1,
    do_sample: DoSample = False,
    num_beams: NumBeams = 1,
    temperature: Temperature = 1.0,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    as_json: AsJson = False,
) -> None:
    """Choose a method's hyper-parameters on a part of the images; test the choice against plain on the rest."""
    from lvlm_fix.evals import tasks, tune

    points = _grid(grid)
    tune.settings_of(method, points)  # before anything slow: a misspelt name is the likeliest mistake
    decoding = _decoding(max_new_tokens, do_sample, num_beams, temperature, range(seed, seed + seeds))
    decoding(1)
    asked: Task
    if task is TaskName.pope:
        asked = tasks.pope(split or (), questions or (), images, annotations, None, limit)
    elif split or questions:
        raise ValueError("--split and --questions belong to POPE; give --task pope, or leave them out")
    else:
        asked = tasks.chair(images, annotations, limit, rule.value)
    _quiet()
    found = tune.tune(
        asked,
        method,
        points,
        model,
        out,
        metric=metric,
        recall_drop=recall_drop,
        validation=validation,
        seed=seed,
        decoding=decoding(asked.max_new_tokens),
        batch_size=batch_size,
        dtype=dtype,
        device_map=device_map,
    )
    if not found:  # not the first of several processes: that one prints
        return
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print(asked, found, out)


def _grid(written: list[str] | None) -> dict[str, list[Any]] | None:
    """`["keep=36,48", "start_layer=-4"]` as field -> values."""
    if not written:
        return None
    grid: dict[str, list[Any]] = {}
    for text in written:
        name, _, values = text.partition("=")
        name = name.strip()
        try:
            read = ast.literal_eval(f"[{values}]") if values.strip() else []
        except (SyntaxError, ValueError):
            read = []
        if not name.isidentifier() or not read or name in grid:
            raise ValueError(f"cannot read grid {text!r}: write it as keep=36,48,72, once for each name")
        grid[name] = read
    return grid


def _print(task: Task, found: dict[str, Any], out: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    metric = found["objective"]["metric"]
    shown = [metric, *(name for name in task.metrics_shown if name != metric)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("images")
    table.add_column("setting", overflow="fold")
    for name in (*shown, "tokens/s"):
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    for part in ("validation", "test"):
        for line in found[part]:
            name = line["setting"] + ("" if line["allowed"] else " (too little recall)")
            cells = [_shown(line["metrics"][one], task.percent) for one in shown]
            table.add_row(part, name, *cells, f"{line['tokens_per_second']:,.1f}")
        table.add_section()
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has no edge to fold at
    console.print(table)
    images = found["images"]
    console.print(f"chosen: {found['chosen']}, {found['reason']}", soft_wrap=True)
    if found["comparison"]:
        own = found["comparison"]
        change, low, high = (own[name] * task.percent for name in ("difference", "low", "high"))
        console.print(
            f"on the test part: {metric.replace('_', ' ')} {change:+.1f} ({low:+.1f} to {high:+.1f}) against "
            f"plain, p {own['p']:.2g}: {own['verdict']}",
            soft_wrap=True,
        )
    console.print(
        f"\n95% intervals; {images['validation']:,} images to choose by, {images['test']:,} to test on; "
        + (f"objects found by the {task.options['rule']} rule; " if "rule" in task.options else "")
        + f"results and manifests in {out}",
        soft_wrap=True,
    )
