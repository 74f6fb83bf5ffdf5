"""Results files: lines are appended as answers come, and the next start sorts out what a kill left behind.

A run of one process writes `results-<slug>.jsonl`. Of several processes each writes
`results-<slug>.rank<k>.jsonl`, and the first merges them when every item is there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from .records import DataError, write_lines

Key = tuple[int, str]  # seed and item id
Row = dict[str, Any]


def results_file(out: Path, slug: str, rank: int | None = None) -> Path:
    """Where a setting's lines stand; with `rank` those of one process of several."""
    return out / f"results-{slug}{'' if rank is None else f'.rank{rank}'}.jsonl"


def key_of(row: Row) -> Key:
    """What a line answers: there is one line to a key."""
    return row["seed"], row["id"]


class Appender:
    """A results file open for lines, for one process only; a torn last line is cut off.

    Raises `BlockingIOError` while another process writes the same file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO[bytes] = path.open("ab")
        try:
            _lock(self.file, path)
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                self.file.truncate(whole)
        except BaseException:
            self.file.close()
            raise

    def write(self, rows: Iterable[Row]) -> None:
        """Append lines, and have them on the disk before returning."""
        self.file.write(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
        self.file.flush()
        os.fsync(self.file.fileno())

    def __enter__(self) -> Appender:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def read_rows(out: Path, slug: str) -> dict[Key, Row]:
    """All whole lines of a setting by what they answer, whichever process wrote them.

    Raises `DataError` for a whole line that is no result: no kill leaves that behind.
    """
    rows: dict[Key, Row] = {}
    # Rank files first: if they are merged and removed meanwhile, the merged file is there to be read.
    for path in (*_rank_files(out, slug), results_file(out, slug)):
        with suppress(FileNotFoundError):
            for row in _whole_lines(path):
                rows.setdefault(key_of(row), row)
    return rows


def merge(out: Path, slug: str, keys: Sequence[Key]) -> None:
    """Make one file of a setting's lines in the order of `keys`, and remove the processes' own files."""
    ranks = _rank_files(out, slug)
    if ranks:
        rows = read_rows(out, slug)
        write_lines(results_file(out, slug), (rows[key] for key in keys))
        for path in ranks:
            path.unlink(missing_ok=True)


def _rank_files(out: Path, slug: str) -> list[Path]:
    return sorted(out.glob(f"{results_file(out, slug).stem}.rank*.jsonl"))


def _whole_lines(path: Path) -> list[Row]:
    rows = []
    *lines, _ = path.read_bytes().split(b"\n")  # after the last line feed stands nothing, or a torn line
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            key_of(row)
            str(row["answer"])
        except (ValueError, TypeError, KeyError):
            raise DataError(
                f"{path}, line {number}: is no result; delete the line to have it done again"
            ) from None
        rows.append(row)
    return rows


def _lock(file: IO[bytes], path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(
            f"another run is writing {path}; wait for it, or give another folder with --out"
        ) from None
    except OSError:  # a file system without locks
        return
