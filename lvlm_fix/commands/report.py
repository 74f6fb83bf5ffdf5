"""`lvlm-fix report`: finished evaluations as one HTML page that needs nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="What --out of `lvlm-fix eval` named, or a folder of such folders."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write; report.html in DIR if not given.")
    ] = None,
    gallery: Annotated[
        int, typer.Option(min=0, max=200, help="How many items to show on which settings disagree, a run.")
    ] = 24,
    images: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of the pictures, if they moved; repeat for more."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write one self-contained HTML page: tables, tests, plots, and a gallery of where settings disagree."""
    from lvlm_fix.evals.report import write_report

    written = write_report(folder, output, gallery, images or ())
    if as_json:
        print(json.dumps(written.to_dict(), indent=2))
        return
    for run, count, shown in zip(written.runs, written.disagreements, written.shown, strict=True):
        print(
            f"{run.task.name}: {len(run.names)} settings on {run.summary['images']:,} images; they disagree on "
            f"{count:,} items, {shown} are shown"
        )
    print(f"report in {written.path}")
