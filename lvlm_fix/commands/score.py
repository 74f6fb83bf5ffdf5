"""`lvlm-fix score`: POPE and CHAIR from files that already hold a model's answers. No model is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from lvlm_fix.evals.chair import ChairScore
    from lvlm_fix.evals.pope import PopeScore
    from lvlm_fix.evals.records import Faults

app = typer.Typer(help="Score answers and captions that are already written.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out faulty lines and count them.")]


class PopeRule(StrEnum):
    official = "official"
    strict = "strict"


class ChairRule(StrEnum):
    reference = "reference"
    english = "english"


@app.command()
def pope(
    questions: Annotated[
        list[Path], typer.Option(help="POPE questions, one JSON object a line; may be given several times.")
    ],
    answers: Annotated[
        list[Path], typer.Option(help="Answers (question_id, answer) to the questions in the same place.")
    ],
    rule: Annotated[
        PopeRule, typer.Option(help="strict refuses answers that say neither yes nor no.")
    ] = PopeRule.official,
    skip_bad: SkipBad = False,
    as_json: AsJson = False,
) -> None:
    """Accuracy, precision, recall, F1 and yes ratio of answers to POPE questions."""
    from lvlm_fix.evals.pope import mean_of, score_files
    from lvlm_fix.evals.records import Faults

    if len(questions) != len(answers):
        raise typer.BadParameter(
            f"{len(questions)} files of questions, but {len(answers)} of answers; give them in pairs",
            param_hint="--answers",
        )
    faults = Faults(skip=skip_bad)
    splits = {
        name: score_files(asked, said, rule.value, faults)
        for name, asked, said in zip(_split_names(questions, answers), questions, answers, strict=True)
    }
    if as_json:
        scores = {name: score.as_dict() for name, score in splits.items()}
        _print_json({"splits": scores, "mean": mean_of(splits.values())}, faults)
    else:
        _print_table(_pope_table(splits), faults)


@app.command()
def chair(
    captions: Annotated[Path, typer.Option(help="Captions (image_id, caption), one JSON object a line.")],
    objects: Annotated[
        list[Path],
        typer.Option(
            help="True objects: one JSON object of image ids and lists of names, or a folder with COCO's "
            "instances_*.json and captions_*.json; may be given several times."
        ),
    ],
    details: Annotated[
        bool, typer.Option("--details", help="Also list the hallucinated words and where they stand.")
    ] = False,
    rule: Annotated[
        ChairRule, typer.Option(help="english also sees the words that the published script overlooks.")
    ] = ChairRule.reference,
    skip_bad: SkipBad = False,
    as_json: AsJson = False,
) -> None:
    """CHAIRs, CHAIRi, recall, F1 and average length of captions."""
    from lvlm_fix.evals.chair import read_captions, score_captions
    from lvlm_fix.evals.coco import read_objects
    from lvlm_fix.evals.records import Faults

    faults = Faults(skip=skip_bad)
    written = read_captions(captions, faults)
    truth = read_objects(objects, {caption.image_id for caption in written}, rule.value, faults)
    score = score_captions(written, truth, rule.value, faults)
    if as_json:
        _print_json({**score.as_dict(), **({"details": _details(score)} if details else {})}, faults)
    else:
        _print_table(_chair_table(score, captions), faults)
        print(f"objects found by the {rule.value} rule")
        if details:
            _print_table(_details_table(score))


def _split_names(questions: Sequence[Path], answers: Sequence[Path]) -> list[str]:
    """Name splits by their questions, and where two share those, by their answers too."""
    names = [_stem(path) for path in questions]
    if len(set(names)) < len(names):
        names = [f"{name} / {_stem(path)}" for name, path in zip(names, answers, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{name} #{number}" for number, name in enumerate(names, 1)]
    return names


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".json").removesuffix(".jsonl")


def _details(score: ChairScore) -> list[dict[str, Any]]:
    return [
        {
            "image_id": marked.image_id,
            "caption": marked.caption,
            "hallucinated": [mention._asdict() for mention in marked.hallucinated],
        }
        for marked in score.marked
    ]


def _pope_table(splits: Mapping[str, PopeScore]) -> Table:
    from lvlm_fix.evals.pope import COUNTS, RATIOS, mean_of

    scores = [score.as_dict() for score in splits.values()]
    means = [mean_of(splits.values())] if len(splits) > 1 else []
    table = _table("", *splits, *("mean" for _ in means))
    for name in RATIOS:
        table.add_row(name.replace("_", " "), *(f"{score[name]:.2%}" for score in scores + means))
    table.add_section()
    for name in COUNTS:
        table.add_row(name, *(f"{score[name]:,}" for score in scores))
    return table


def _chair_table(score: ChairScore, path: Path) -> Table:
    table = _table("", _stem(path))
    for name, number in score.as_dict().items():
        if name in ("CHAIRs", "CHAIRi", "recall", "f1"):
            shown = f"{number:.2f}%"
        else:
            shown = f"{number:,.1f}" if name == "average_length" else f"{number:,}"
        table.add_row(name.replace("_", " "), shown)
    return table


def _details_table(score: ChairScore) -> Table:
    table = _table("image", "word", "category", "characters")
    for marked in score.marked:
        for word, category, start, end in marked.hallucinated:
            table.add_row(marked.image_id, word, category, f"{start}-{end}")
    return table


def _table(first: str, *others: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _print_table(table: Table, faults: Faults | None = None) -> None:
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has no edge to fold at
    console.print(table)
    if faults and faults.count:
        console.print(
            f"skipped {faults.count} faulty records, the first: {faults.messages[0]}", soft_wrap=True
        )


def _print_json(result: dict[str, Any], faults: Faults) -> None:
    typer.echo(json.dumps({**result, "skipped": faults.count, "problems": faults.messages}))
