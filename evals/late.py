"""Judges what can be judged only when all answers are there; can be stopped and continued, as the answers can."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from . import manifest as manifests
from .records import read_json, write_lines
from .results import Key, Row, results_file
from .settings import Setting
from .tasks import Task

PICTURES = 64  # judged at once, with what all settings say of them: each picture is looked at once
SAVE_SECONDS = 30.0  # about so much is judged again after a kill


def add_late(
    task: Task,
    out: Path,
    settings: Sequence[Setting],
    rows: Sequence[dict[Key, Row]],
    progress: bool = False,
) -> None:
    """Add the task's late columns to `rows`, of each setting, and to its results file in `out`.

    At any moment the columns in the files are of what the manifest names under `late`: those of another judge
    go before that is named, and new ones come after. So a kill can neither lose nor mix them.
    """
    if not task.late:
        return
    _drop_others(task, out, settings, rows)
    parts = _parts(rows)
    todo = [part for part in parts if any(name not in row for row in part for name in task.late)]
    if not todo:
        return
    from tqdm import tqdm

    total, left = (sum(map(len, some)) for some in (parts, todo))
    saved = time.monotonic()
    with tqdm(
        total=total,
        initial=total - left,
        desc=", ".join(task.late_options),
        unit="answer",
        disable=not progress,
    ) as bar:
        for part in todo:
            for row, columns in zip(part, task.late_columns(part), strict=True):
                row.update(columns)
            bar.update(len(part))
            if time.monotonic() - saved > SAVE_SECONDS:
                _save(out, settings, rows)
                saved = time.monotonic()
    _save(out, settings, rows)


def _drop_others(task: Task, out: Path, settings: Sequence[Setting], rows: Sequence[dict[Key, Row]]) -> None:
    """Take away columns that were made with other options, or nobody knows with which, and note the own ones."""
    options = task.late_options
    if read_json(out / manifests.FILE).get("late") == options:
        return
    manifests.note(out, late=None)
    for own in rows:
        for row in own.values():
            for name in task.late:
                row.pop(name, None)
    _save(out, settings, rows)
    manifests.note(out, late=options)


def _parts(rows: Sequence[dict[Key, Row]]) -> list[list[Row]]:
    """All lines, cut by pictures and always alike: what stands beside a line can change its last bits."""
    of_picture: dict[str, list[Row]] = defaultdict(list)
    for own in rows:
        for row in own.values():
            of_picture[row["image"]].append(row)
    groups = list(of_picture.values())
    return [
        [row for group in groups[start : start + PICTURES] for row in group]
        for start in range(0, len(groups), PICTURES)
    ]


def _save(out: Path, settings: Sequence[Setting], rows: Sequence[dict[Key, Row]]) -> None:
    for setting, own in zip(settings, rows, strict=True):
        write_lines(results_file(out, setting.slug), own.values())
