"""`lvlm-fix eval`: a benchmark, plain and with methods under the same decoding, with intervals and tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lvlm_fix.evals.settings import Decoding
    from lvlm_fix.evals.tasks import Task

app = typer.Typer(
    help="Run a benchmark, plain and with methods; start it again to go on where it was.",
    no_args_is_help=True,
)


class Split(StrEnum):
    random = "random"
    popular = "popular"
    adversarial = "adversarial"


class ChairRule(StrEnum):
    english = "english"
    reference = "reference"


Model = Annotated[str, typer.Option(help="'embedded', a local folder or a hub id.")]
Fix = Annotated[
    list[str] | None,
    typer.Option(
        help="Methods of one setting, such as 'damro(alpha=0.5),vtc_cls'; repeat for more. Plain always runs."
    ),
]
Images = Annotated[Path | None, typer.Option(help="Folder of the pictures. [default: embedded scenes]")]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Only the first so many, of each split; of POPE an even number.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Questions asked at once.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Longest answer. [default: the benchmark's]")]
Seed = Annotated[int, typer.Option(min=0, help="First seed of sampling.")]
Seeds = Annotated[int, typer.Option(min=1, help="How many seeds to sample with, from --seed on.")]
DoSample = Annotated[bool, typer.Option("--do-sample", help="Sample instead of decoding greedily.")]
NumBeams = Annotated[int, typer.Option(min=1, help="Beams.")]
Temperature = Annotated[float, typer.Option(help="Of sampling.")]
Dtype = Annotated[str, typer.Option(help="Such as float16; 'auto' is the checkpoint's own.")]
DeviceMap = Annotated[
    str | None, typer.Option(help="'auto' spreads a large model. [default: the GPU, if there is one]")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the summary as JSON instead of a table.")]


@app.command()
def pope(
    model: Model = "embedded",
    fix: Fix = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("eval-pope"),
    split: Annotated[
        list[Split] | None,
        typer.Option(help="How absent objects are chosen; repeat for more. [default: all three]"),
    ] = None,
    questions: Annotated[
        list[Path] | None,
        typer.Option(help="POPE questions, one JSON object a line; repeat for more splits."),
    ] = None,
    images: Images = None,
    annotations: Annotated[
        Path | None, typer.Option(help="COCO instances to build questions from. [default: embedded scenes]")
    ] = None,
    statistics: Annotated[
        Path | None, typer.Option(help="Frequency and co-occurrence, if not the annotations'.")
    ] = None,
    limit: Limit = None,
    batch_size: BatchSize = 16,
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = 0,
    seeds: Seeds = 1,
    do_sample: DoSample = False,
    num_beams: NumBeams = 1,
    temperature: Temperature = 1.0,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    as_json: AsJson = False,
) -> None:
    """Yes-or-no questions about objects: accuracy, precision, recall, F1 and yes ratio."""

    def task() -> Task:
        from lvlm_fix.evals import tasks

        return tasks.pope(split or (), questions or (), images, annotations, statistics, limit)

    decoding = _decoding(max_new_tokens, do_sample, num_beams, temperature, range(seed, seed + seeds))
    _evaluate(task, model, fix, out, batch_size, decoding, dtype, device_map, as_json)


@app.command()
def chair(
    model: Model = "embedded",
    fix: Fix = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("eval-chair"),
    images: Images = None,
    annotations: Annotated[
        Path | None,
        typer.Option(
            help="COCO instances, or a folder that holds captions besides. [default: embedded scenes]"
        ),
    ] = None,
    rule: Annotated[
        ChairRule,
        typer.Option(help="reference misses words that the published script does, 'bus' among them."),
    ] = ChairRule.english,
    prompt: Annotated[str, typer.Option(help="What is asked about every picture.")] = "Describe the image.",
    clipscore: Annotated[
        bool, typer.Option("--clipscore", help="CLIPScore too; also for a finished run in the same --out.")
    ] = False,
    clip: Annotated[
        Path | None,
        typer.Option(
            help="Folder of an OpenCLIP model with its open_clip_config.json, or architecture and weights, as "
            "ViT-B-32:weights.safetensors. [default: one that knows the embedded scenes only]"
        ),
    ] = None,
    clip_prefix: Annotated[
        str | None,
        typer.Option(
            help="Put before captions. [default: the model's, or 'A photo depicts' as in the paper]"
        ),
    ] = None,
    limit: Limit = None,
    batch_size: BatchSize = 16,
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = 0,
    seeds: Seeds = 1,
    do_sample: DoSample = False,
    num_beams: NumBeams = 1,
    temperature: Temperature = 1.0,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    as_json: AsJson = False,
) -> None:
    """Captions: how many objects in them are not in the picture, and how many of the picture's they name."""
    if not clipscore and (clip is not None or clip_prefix is not None):
        raise ValueError("--clip and --clip-prefix are about CLIPScore; give --clipscore too")
    if clipscore and clip is None and (images is not None or annotations is not None):
        raise ValueError(
            "the OpenCLIP model that ships knows the embedded scenes only; "
            "name one that knows your pictures with --clip"
        )

    def task() -> Task:
        from lvlm_fix.evals import tasks

        asked = tasks.chair(images, annotations, limit, rule.value, prompt)
        if not clipscore:
            return asked
        from lvlm_fix.evals.clipscore import ClipScoredChair

        return ClipScoredChair.of(asked, clip, clip_prefix)

    decoding = _decoding(max_new_tokens, do_sample, num_beams, temperature, range(seed, seed + seeds))
    _evaluate(task, model, fix, out, batch_size, decoding, dtype, device_map, as_json)


@app.command()
def mme(
    data: Annotated[
        Path, typer.Option(help="MME's folder, with existence, count, position and color in it.")
    ],
    model: Model = "embedded",
    fix: Fix = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("eval-mme"),
    subset: Annotated[
        list[str] | None, typer.Option(help="A folder in it; repeat for more. [default: these four]")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many pictures of each.")] = None,
    batch_size: BatchSize = 16,
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = 0,
    seeds: Seeds = 1,
    do_sample: DoSample = False,
    num_beams: NumBeams = 1,
    temperature: Temperature = 1.0,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    as_json: AsJson = False,
) -> None:
    """Pairs of yes-or-no questions: accuracy and, where both must be right, accuracy+."""

    def task() -> Task:
        from lvlm_fix.evals import mme

        return mme.mme(data, subset or mme.SUBSETS, limit)

    decoding = _decoding(max_new_tokens, do_sample, num_beams, temperature, range(seed, seed + seeds))
    _evaluate(task, model, fix, out, batch_size, decoding, dtype, device_map, as_json)


def _decoding(
    max_new_tokens: int | None, do_sample: bool, num_beams: int, temperature: float, seeds: range
) -> Callable[[int], Decoding]:
    """The decoding, once the benchmark's own longest answer is known."""

    def of(longest: int) -> Decoding:
        from lvlm_fix.evals.settings import Decoding

        return Decoding(max_new_tokens or longest, do_sample, temperature, num_beams, tuple(seeds))

    return of


def _evaluate(
    task: Callable[[], Task],
    model: str,
    fix: list[str] | None,
    out: Path,
    batch_size: int,
    decoding: Callable[[int], Decoding],
    dtype: str,
    device_map: str | None,
    as_json: bool,
) -> None:
    from lvlm_fix.evals.settings import parse_settings

    settings = parse_settings(fix or ())  # before anything slow: a misspelt method is the likeliest mistake
    decoding(1)
    asked = task()
    how = decoding(asked.max_new_tokens)
    _quiet()
    from lvlm_fix.evals.runner import run

    summary = run(
        asked, model, settings, out, decoding=how, batch_size=batch_size, dtype=dtype, device_map=device_map
    )
    if not summary:  # not the first of several processes: that one prints
        return
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        _print(asked, summary, out)


def _quiet() -> None:
    """Keep transformers' own bars and notes off the terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _print(task: Task, summary: dict[str, Any], out: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    several = len(summary["settings"][0]["splits"]) > 1
    for name in ("setting", *(["split"] if several else [])):
        table.add_column(name, overflow="fold")
    for name in (*task.metrics_shown, "tokens/s"):
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    for setting in summary["settings"]:
        for split, metrics in setting["splits"].items():
            cells = [_shown(metrics[name], task.percent) for name in task.metrics_shown]
            table.add_row(
                setting["name"], *([split] if several else []), *cells, f"{setting['tokens_per_second']:,.1f}"
            )
        table.add_section()
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has no edge to fold at
    console.print(table)
    for line in _verdicts(task, summary):
        console.print(line, soft_wrap=True)
    cut = [
        f"{counts['truncated_captions']:,} of {setting['name']}"
        for setting in summary["settings"]
        for counts in setting["counts"].values()
        if counts.get("truncated_captions")
    ]
    if cut:
        console.print(f"captions that CLIPScore read only the beginning of: {', '.join(cut)}", soft_wrap=True)
    several_seeds = len(summary["seeds"]) > 1
    console.print(
        f"\n{summary['confidence']:.0%} intervals from {summary['resamples']:,} resamples of "
        f"{summary['images']:,} images; "
        + (f"± standard deviation over {len(summary['seeds'])} seeds; " if several_seeds else "")
        + (f"objects found by the {task.options['rule']} rule; " if "rule" in task.options else "")
        + f"results and manifest in {out}",
        soft_wrap=True,
    )


def _shown(estimate: Mapping[str, Any], percent: float) -> str:
    value, low, high = (estimate[name] * percent for name in ("value", "low", "high"))
    shown = f"{value:.1f}\n{low:.1f} to {high:.1f}"
    return shown + (f"\n± {estimate['deviation'] * percent:.1f}" if "deviation" in estimate else "")


def _verdicts(task: Task, summary: dict[str, Any]) -> list[str]:
    """One line for each setting and split: what differs from the plain model, or that nothing does."""
    from lvlm_fix.evals.summary import NO_DIFFERENCE

    found: dict[tuple[str, str], list[str]] = {}
    for entry in summary["comparisons"]:
        lines = found.setdefault((entry["setting"], entry["split"]), [])
        if entry["significant"] and entry["metric"] in task.metrics_shown:
            change = entry["difference"] * task.percent
            metric = entry["metric"].replace("_", " ")
            lines.append(f"{metric} {change:+.1f} ({entry['verdict']}, p {entry['p_holm']:.2g})")
    several = len(summary["settings"][0]["splits"]) > 1
    return [
        f"{setting}{f', {split}' if several else ''}: {'; '.join(lines) or NO_DIFFERENCE} against plain"
        for (setting, split), lines in found.items()
    ]
