"""`lvlm-fix describe`: one picture, plain and fixed side by side."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import typer

TRUTH = "objects.json"  # beside the samples: file name -> true objects


def describe(
    picture: Path = typer.Argument(help="The picture, such as assets/samples/kitchen.png."),
    question: str = typer.Option("Describe the image.", help="What to ask."),
    fix: list[str] = typer.Option(
        None,
        help="Methods of one column, such as 'damro(alpha=1.0),vtc_cls'; repeat for more. [default: each alone]",
    ),
    model: str = typer.Option("embedded", help="'embedded', a local folder or a hub id."),
    objects: str = typer.Option(
        None, help="True objects, separated by commas. [default: objects.json beside the picture]"
    ),
    max_new_tokens: int = typer.Option(64, min=1, help="Longest answer."),
    json_: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Say what is in a picture, without and with the methods, with hallucinated objects marked."""
    from lvlm_fix.pictures import open_picture

    image = open_picture(picture)  # before anything slow: a bad picture is the likeliest mistake
    truth = _truth(picture, objects)
    with _progress(f"loading {model}") as show:
        from lvlm_fix.methods import METHODS, parse
        from lvlm_fix.wrapper import LVLM

        settings = ["none", *(fix or METHODS)]
        chosen = [parse(text) for text in settings]
        lvlm = LVLM(_quietly(model))
        results = []
        for text, methods in zip(settings, chosen, strict=True):
            show(f"asking with {text}")
            answer = lvlm.ask(image, question, methods, max_new_tokens)
            results.append(_result(text, answer, truth))
    if json_:
        print(
            json.dumps(
                {"picture": str(picture), "question": question, "objects": truth, "answers": results},
                indent=2,
            )
        )
    else:
        _print(picture, question, truth, results)


def _quietly(model: str) -> str:
    """Keep transformers' own bars and notes off the terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return model


def _truth(picture: Path, objects: str | None) -> list[str] | None:
    if objects is not None:
        return [name.strip() for name in objects.split(",") if name.strip()]
    known = picture.parent / TRUTH
    if not known.exists():
        return None
    try:
        truth = json.loads(known.read_text(encoding="utf-8")).get(picture.name)
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"cannot read {known}: it must map file names to lists of objects ({error})"
        ) from error
    if truth is not None and not (isinstance(truth, list) and all(isinstance(name, str) for name in truth)):
        raise ValueError(f"cannot use {known}: {picture.name} must have a list of objects, not {truth!r}")
    return truth


def _result(text: str, answer: Any, truth: list[str] | None) -> dict[str, Any]:
    from lvlm_fix.evals.chair import hallucinated

    wrong = hallucinated(answer.text, truth, rule="english") if truth is not None else []
    return {
        "fix": text,
        "text": answer.text,
        "hallucinated": [
            {"word": word, "object": category, "start": start, "end": end}
            for word, category, start, end in wrong
        ],
        "tokens": answer.tokens,
        "seconds": round(answer.seconds, 3),
        "report": answer.report,
    }


def _print(picture: Path, question: str, truth: list[str] | None, results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(markup=False, emoji=False, highlight=False)  # a question may hold [brackets]
    console.print(f"{picture}  {question}")
    if truth is not None:
        console.print(f"in the picture: {', '.join(truth)}")
    table = Table(show_lines=True)
    for result in results:
        table.add_column("plain" if result["fix"] == "none" else result["fix"], ratio=1)
    table.add_row(*(_marked(Text, result) for result in results))
    table.add_row(*(f"{result['tokens']} tokens in {result['seconds']:.2f} s" for result in results))
    console.print(table)
    if any(result["hallucinated"] for result in results):
        console.print(Text.assemble(("[word]", "bold red"), " is not in the picture"))


def _marked(text_type: Any, result: dict[str, Any]) -> Any:
    """The answer with hallucinated words in brackets and red: brackets alone must do where there is no colour."""
    text, at = text_type(), 0
    for mention in result["hallucinated"]:
        text.append(result["text"][at : mention["start"]])
        text.append(f"[{result['text'][mention['start'] : mention['end']]}]", style="bold red")
        at = mention["end"]
    text.append(result["text"][at:])
    return text


class _progress(AbstractContextManager):
    """A line on stderr that says what is going on; nothing where stderr is no terminal."""

    def __init__(self, text: str) -> None:
        from rich.console import Console
        from rich.text import Text

        self.plain = Text  # a model's or a method's [brackets] are no markup
        self.status = Console(stderr=True).status(Text(text))

    def __enter__(self) -> Any:
        self.status.start()
        return lambda text: self.status.update(self.plain(text))

    def __exit__(self, *error: Any) -> None:
        self.status.stop()
