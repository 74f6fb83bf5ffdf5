"""Asks a model everything under each setting; can be stopped, continued and spread over processes.

The batches are cut from the full list of items, always alike, and each is asked as a whole. So an answer
never depends on where a run was stopped or how many processes share it.
"""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import manifest as manifests
from .memory import PeakMemory
from .processes import Process, warn_if_alone
from .records import write_lines
from .results import Appender, Key, Row, merge, read_rows, results_file
from .settings import Decoding, Setting, parse_settings
from .summary import summarize
from .tasks import Item, Task

if TYPE_CHECKING:
    from lvlm_fix import LVLM
    from lvlm_fix.methods import Method

SUMMARY = "summary.json"
PATIENCE = 1800.0  # seconds without a new line from any process, after which waiting for them ends
_POLL = 0.2


@dataclass(frozen=True)
class Ask:
    """A question about a picture, and the items it answers: splits often ask the same."""

    items: tuple[Item, ...]

    @property
    def prompt(self) -> str:
        return f"{self.items[0].image}\n{self.items[0].question}"


def run(
    task: Task,
    model: str | Path | LVLM = "embedded",
    settings: Iterable[str | Setting | Sequence[Method]] = (),
    out: str | Path = "eval",
    *,
    decoding: Decoding | None = None,
    batch_size: int = 16,
    dtype: str = "auto",
    device_map: str | None = None,
    command: Sequence[str] | None = None,
    progress: bool = True,
    patience: float = PATIENCE,
) -> dict[str, Any]:
    """Ask `model` all of `task` plain and under each of `settings`, or go on where an earlier run stopped.

    Args:
        task: what to ask, such as `pope()` or `chair()` of `tasks`.
        model: what `lvlm_fix.load` takes, or an `LVLM`.
        settings: as `--fix` spells them, or sequences of methods; the plain model is always among them.
        out: folder of the results, of this run only.
        decoding: the same for all settings; greedy, of the task's own length, by default.
        batch_size: questions asked at once.
        dtype, device_map: passed on to `lvlm_fix.load`; without a map the model goes to a GPU if there is.
        command: what the manifest calls the command line; that of this process by default.
        progress: show bars on stderr.
        patience: seconds to wait for the other processes of a run without any news of them.

    Returns:
        What `summary.json` holds; of several processes only the first has it, and the others return {}.

    Raises:
        ValueError: a bad setting, or `out` holds a different run.
        OSError: files cannot be read or written, or another process of the run falls silent (`TimeoutError`).
    """
    if batch_size < 1:
        raise ValueError("batch_size counts from 1")
    process, out = Process.from_environment(), Path(out)
    warn_if_alone()
    chosen = parse_settings(settings)
    decoding = decoding or Decoding(max_new_tokens=task.max_new_tokens)
    lvlm, name = _load(model, dtype, device_map, process)
    parts = batches(task.items, batch_size)
    for setting in chosen:  # one that does not suit the model fails now, not after hours of the others
        _ask(lvlm, setting, Decoding(max_new_tokens=1), 0, parts[0][:1])
    out.mkdir(parents=True, exist_ok=True)
    described = manifests.describe(task, lvlm, chosen, decoding, batch_size, name, command)
    manifests.claim(out, described, process.rank == 0, _wait(time.monotonic() + patience))

    for setting in chosen:
        _answer(task, lvlm, setting, decoding, parts, out, process, progress)
    if process.rank:
        return {}
    keys = [
        (seed, item.id) for seed in decoding.seeds for part in parts for ask in part for item in ask.items
    ]
    rows = []
    for setting in chosen:
        rows.append(_all_rows(out, setting, keys, process, patience))
        merge(out, setting.slug, keys)
    _add_late(task, out, chosen, rows)
    summary = summarize(task, chosen, rows, decoding.seeds)
    manifests.write_json(out / SUMMARY, summary)
    return summary


def batches(items: Iterable[Item], size: int) -> list[list[Ask]]:
    """Items as batches of `size` different questions, longest first, those about one picture side by side."""
    asked: dict[tuple[Path, str], list[Item]] = defaultdict(list)
    for item in items:
        asked[item.path, item.question].append(item)
    of_picture: dict[Path, list[Ask]] = defaultdict(list)
    for (path, _), same in asked.items():
        of_picture[path].append(Ask(tuple(same)))
    groups = [sorted(group, key=_length, reverse=True) for group in of_picture.values()]
    asks = [ask for group in sorted(groups, key=lambda group: -_length(group[0])) for ask in group]
    return [asks[start : start + size] for start in range(0, len(asks), size)]


def _length(ask: Ask) -> int:
    return len(ask.items[0].question)


def _answer(
    task: Task,
    lvlm: LVLM,
    setting: Setting,
    decoding: Decoding,
    parts: Sequence[Sequence[Ask]],
    out: Path,
    process: Process,
    progress: bool,
) -> None:
    """Append the answers that this process owes under one setting."""
    from tqdm import tqdm

    with ExitStack() as stack:
        rank = process.rank if process.world > 1 else None
        path = results_file(out, setting.slug, rank)
        todo = list(_owed(parts, decoding.seeds, process))
        done = read_rows(out, setting.slug)
        missing = [(seed, part) for seed, part in todo if not _keys(seed, part) <= done.keys()]
        if not missing:
            return
        appender = stack.enter_context(Appender(path))
        stack.enter_context(
            warnings.catch_warnings(action="ignore", category=UserWarning)
        )  # said at the trial
        total = sum(len(part) for _, part in todo)
        bar = stack.enter_context(
            tqdm(
                total=total,
                initial=total - sum(len(part) for _, part in missing),
                desc=f"{task.name}, {setting.name}",
                unit="question",
                disable=not progress or process.rank > 0,
            )
        )
        device = manifests.loaded(lvlm).device
        memory = PeakMemory(device)
        if device.type == "cuda":  # compiles and picks kernels: no part of the time of the answers
            _ask(lvlm, setting, Decoding(max_new_tokens=1), 0, missing[0][1])
        for seed, part in missing:
            started = time.perf_counter()
            answers = _ask(lvlm, setting, decoding, seed, part)
            seconds = (time.perf_counter() - started) / len(part)
            lines = _rows(task, seed, part, answers, seconds, memory.peak())
            appender.write(row for key, row in lines.items() if key not in done)
            bar.update(len(part))


def _owed(
    parts: Sequence[Sequence[Ask]], seeds: Sequence[int], process: Process
) -> Iterator[tuple[int, Sequence[Ask]]]:
    """Every how-many-processes-th batch. Not single items: padding can change a row's last bits."""
    units = [(seed, part) for seed in seeds for part in parts]
    return iter(units[process.rank :: process.world])


def _keys(seed: int, part: Iterable[Ask]) -> set[Key]:
    return {(seed, item.id) for ask in part for item in ask.items}


def _ask(lvlm: LVLM, setting: Setting, decoding: Decoding, seed: int, part: Sequence[Ask]) -> list[Any]:
    from lvlm_fix import open_picture

    pictures = {path: open_picture(path) for path in dict.fromkeys(ask.items[0].path for ask in part)}
    return lvlm.ask(
        [pictures[ask.items[0].path] for ask in part],
        [ask.items[0].question for ask in part],
        fix=setting.methods,
        max_new_tokens=decoding.max_new_tokens,
        **decoding.generation(seed, [ask.prompt for ask in part]),
    )


def _rows(
    task: Task, seed: int, part: Sequence[Ask], answers: Sequence[Any], seconds: float, memory: int
) -> dict[Key, Row]:
    """Results lines; where one answer serves several items, the first of them has its tokens and time."""
    rows: dict[Key, Row] = {}
    for ask, answer in zip(part, answers, strict=True):
        for item in ask.items:
            row: Row = {"id": item.id, "seed": seed, "split": item.split, "image": item.image}
            row |= {"question": item.question, "answer": answer.text, **task.judge(item, answer.text)}
            if item is ask.items[0]:
                row |= {"tokens": answer.tokens, "seconds": round(seconds, 6), "memory": memory}
            else:
                row |= {"same_as": ask.items[0].id}
            rows[seed, item.id] = row
    return rows


def _all_rows(
    out: Path, setting: Setting, keys: Sequence[Key], process: Process, patience: float
) -> dict[Key, Row]:
    """Every line of a setting, waiting for those that other processes still owe."""
    waiting, known = _wait(time.monotonic() + patience), -1
    while True:
        rows = read_rows(out, setting.slug)
        lacking = [key for key in keys if key not in rows]
        if not lacking:
            return {key: rows[key] for key in keys}
        if len(rows) > known:
            waiting, known = _wait(time.monotonic() + patience), len(rows)
        if process.world == 1 or not waiting():
            raise TimeoutError(
                f"{len(lacking)} of {len(keys)} items of {setting.name} are missing, and no process has "
                f"written one for {patience:g} s; see what the others say, then start again to go on"
            )


def _add_late(task: Task, out: Path, settings: Sequence[Setting], rows: Sequence[dict[Key, Row]]) -> None:
    """Judge what can be judged only when all answers are there, in `rows` and in the results files."""
    lines = [row for own in rows for row in own.values()]
    columns = task.late_columns(lines)
    if not columns:
        return
    for row, more in zip(lines, columns, strict=True):
        row.update(more)
    for setting, own in zip(settings, rows, strict=True):
        write_lines(results_file(out, setting.slug), own.values())
    manifests.note_late(out, task.late_options)


def _wait(end: float) -> Callable[[], bool]:
    """A short sleep, and whether there is time left."""

    def pause() -> bool:
        time.sleep(_POLL)
        return time.monotonic() < end

    return pause


def _load(
    model: str | Path | LVLM, dtype: str, device_map: str | None, process: Process
) -> tuple[LVLM, str | None]:
    """The model, and the name it was loaded by, if it was."""
    if not isinstance(model, str | Path):
        return model, None
    import torch

    from lvlm_fix import LVLM

    if device_map is None and torch.cuda.is_available():
        device_map = f"cuda:{process.local_rank % torch.cuda.device_count()}"
    return LVLM(model, dtype=dtype, device_map=device_map), str(model)
