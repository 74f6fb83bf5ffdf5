"""`lvlm-fix build`: benchmark questions from annotations. No model is loaded."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Build benchmark files from annotations.", no_args_is_help=True)


class Split(StrEnum):
    random = "random"
    popular = "popular"
    adversarial = "adversarial"


@app.callback()
def build() -> None:
    """Build benchmark files from annotations."""  # a callback keeps `pope` a subcommand, though the only one


@app.command()
def pope(
    annotations: Annotated[Path, typer.Option(help="COCO instances file of the images to ask about.")],
    split: Annotated[Split, typer.Option(help="How the absent objects are chosen.")],
    out: Annotated[Path, typer.Option(help="File to write, one question a line.")],
    seed: Annotated[int, typer.Option(help="Same seed, same questions.")] = 0,
    images: Annotated[
        int | None, typer.Option(min=1, help="How many images; all that fit by default.")
    ] = None,
    per_image: Annotated[int, typer.Option(min=1, help="Present objects per image, and absent ones.")] = 3,
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="Take frequency and co-occurrence from this file: COCO instances, or counts in JSON."
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """POPE questions: half about objects in the image, half about objects that are not."""
    from lvlm_fix.evals.build_pope import build_pope
    from lvlm_fix.evals.records import check_place, write_lines

    check_place(out)
    rows = build_pope(annotations, split.value, seed, images, per_image, statistics)
    write_lines(out, rows)
    asked = len({row["image"] for row in rows})
    if json_:
        print(json.dumps({"out": str(out), "split": split.value, "questions": len(rows), "images": asked}))
    else:
        print(f"{out}: {len(rows):,} questions about {asked:,} images")
