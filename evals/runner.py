"""Asks a model everything under each setting; can be stopped, continued and spread over processes.

The batches are cut from the full list of items, always alike, and each is asked as a whole. So an answer
never depends on where a run was stopped or how many processes share it.
"""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import manifest as manifests
from .clock import Clock
from .late import add_late
from .memory import PeakMemory
from .processes import Process, warn_if_alone
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
_WARM = 2  # tokens of an answer that is not counted: one from the prompt, one from the cache

Unit = tuple[int, Sequence["Ask"]]  # a seed, and a batch of questions


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
    # What differs without a look at the model is told before it is loaded.
    manifests.refuse_another(
        out, manifests.known_without_model(task, chosen, decoding, batch_size), partly=True
    )
    lvlm, name = _load(model, dtype, device_map, process)
    parts = batches(task.items, batch_size)
    for setting in chosen:  # one that does not suit the model fails now, not after hours of the others
        _ask(lvlm, setting, Decoding(max_new_tokens=1), 0, parts[0][:1])
    out.mkdir(parents=True, exist_ok=True)
    described = manifests.describe(task, lvlm, chosen, decoding, batch_size, name, command)
    manifests.claim(out, described, process.rank == 0, _wait(time.monotonic() + patience))

    units = [(seed, part) for seed in decoding.seeds for part in parts]
    keys = [(seed, item.id) for seed, part in units for ask in part for item in ask.items]
    clock = Clock(sum(len(set(keys) - read_rows(out, setting.slug).keys()) for setting in chosen))
    _answer(task, lvlm, chosen, decoding, units, out, process, progress)
    if process.rank:
        return {}
    rows = []
    for setting in chosen:
        rows.append(_all_rows(out, setting, keys, process, patience))
        merge(out, setting.slug, keys)
    clock.note(out, chosen, rows)
    add_late(task, out, chosen, rows, progress)
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
    settings: Sequence[Setting],
    decoding: Decoding,
    units: Sequence[Unit],
    out: Path,
    process: Process,
    progress: bool,
) -> None:
    """Append the answers that this process owes.

    Settings take turns, batch by batch, and each begins as often as the others. So whatever else the machine does
    meanwhile, growing warm among it, falls on all of them alike, and their times can be compared.
    """
    from tqdm import tqdm

    # Every how-many-processes-th batch. Not single items: padding can change a row's last bits.
    owed = units[process.rank :: process.world]
    with ExitStack() as stack:
        files = {
            setting.name: stack.enter_context(Appender(results_file(out, setting.slug, process.file_rank)))
            for setting in settings
            if _missing(owed, read_rows(out, setting.slug))
        }
        # Read again, now that no other run can write the same.
        done = {setting.name: read_rows(out, setting.slug) for setting in settings}
        missing = {name: _missing(owed, done[name]) for name in files}
        if not any(missing.values()):
            return
        stack.enter_context(
            warnings.catch_warnings(action="ignore", category=UserWarning)
        )  # said at the trial
        total = len(settings) * sum(len(part) for _, part in owed)
        left = sum(len(owed[number][1]) for own in missing.values() for number in own)
        bar = stack.enter_context(
            tqdm(
                total=total, initial=total - left, desc=task.name, unit="answer",
                disable=not progress or process.rank > 0,
            )
        )  # fmt: skip
        short = replace(decoding, max_new_tokens=_WARM)
        for setting in settings:  # the first call of a kind is slow, and no part of the time of the answers
            if missing.get(setting.name):
                _ask(lvlm, setting, short, *owed[min(missing[setting.name])])
        for number, (seed, part) in enumerate(owed):
            turn = number % len(settings)
            for setting in (*settings[turn:], *settings[:turn]):
                if number in missing.get(setting.name, ()):
                    lines = _timed(task, lvlm, setting, decoding, seed, part)
                    known = done[setting.name]
                    files[setting.name].write(row for key, row in lines.items() if key not in known)
                    bar.update(len(part))


def _missing(owed: Sequence[Unit], done: Mapping[Key, Row]) -> set[int]:
    """The numbers of the batches of which a line is missing."""
    return {
        number
        for number, (seed, part) in enumerate(owed)
        if any((seed, item.id) not in done for ask in part for item in ask.items)
    }


def _timed(
    task: Task, lvlm: LVLM, setting: Setting, decoding: Decoding, seed: int, part: Sequence[Ask]
) -> dict[Key, Row]:
    memory = PeakMemory(manifests.loaded(lvlm).device)
    started = time.perf_counter()
    answers = _ask(lvlm, setting, decoding, seed, part)
    seconds = (time.perf_counter() - started) / len(part)
    return _rows(task, seed, part, answers, seconds, memory.peak())


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
