"""`lvlm-fix diagnose`: which methods suit a model, measured on a few pictures."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from lvlm_fix.commands.describe import _progress, _quietly


def diagnose(
    pictures: list[Path] = typer.Argument(
        None, help="A few pictures; they need no labels. [default: those that ship]", show_default=False
    ),
    model: str = typer.Option("embedded", help="'embedded', a local folder or a hub id."),
    question: str = typer.Option("Describe the image.", help="What to ask about each."),
    picture: Path = typer.Option(None, help="Draw what was measured there, as a PNG.", show_default=False),
    json_: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Measure on a few pictures whether what each method rests on is true of a model."""
    from lvlm_fix.pictures import open_picture

    for path in pictures or ():  # before anything slow: a bad path is the likeliest mistake
        open_picture(path)
    if picture is not None and not picture.absolute().parent.is_dir():
        raise OSError(f"cannot draw {picture}: there is no folder {picture.parent}; make it first")
    with _progress(f"loading {model}") as show:
        from lvlm_fix.diagnosis import diagnose, sample_pictures
        from lvlm_fix.loading import load

        loaded, processor = load(_quietly(model))
        show("looking at the pictures")
        found = diagnose(loaded, processor, pictures or sample_pictures(), question=question)
        if picture is not None:
            found.picture(picture)
    print(json.dumps(found.to_dict(), indent=2) if json_ else found)
