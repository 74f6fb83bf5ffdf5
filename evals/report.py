"""One self-contained HTML page about finished runs: what came out, tables, plots, and where settings disagree."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .report_gallery import Disagreement, disagreements
from .report_page import page
from .report_pictures import Thumbnail, find_pictures, thumbnails
from .report_runs import Run, find_runs

FILE = "report.html"
GALLERY = 24
MOST_GALLERY = 200
PICTURE_BYTES = 3_000_000  # of all pictures of a page: with the rest of it they stay below 5 MB


@dataclass(frozen=True)
class Report:
    """A page that was written, and what is on it."""

    path: Path
    runs: tuple[Run, ...]
    disagreements: tuple[int, ...]  # of each run, all of them
    shown: tuple[int, ...]  # of each run, those in the gallery

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "report": str(self.path),
            "bytes": self.path.stat().st_size,
            "runs": [
                {
                    "folder": str(run.folder), "task": run.task.name, "settings": run.names,
                    "disagreements": count, "shown": shown,
                }
                for run, count, shown in zip(self.runs, self.disagreements, self.shown, strict=True)
            ],
        }  # fmt: skip


def write_report(
    folder: str | Path,
    output: str | Path | None = None,
    gallery_items: int = GALLERY,
    images: Sequence[str | Path] = (),
) -> Report:
    """Write the page about the run in `folder`, or about the runs in its subfolders.

    Args:
        folder: what `--out` of `lvlm-fix eval` named, or a folder of such folders.
        output: the file to write; `report.html` in `folder` by default.
        gallery_items: how many items to show of each run, 0 to 200.
        images: where pictures may be; the folders that the runs' command lines name are tried too.

    Warns where a run's pictures are not found: its gallery then has none.

    Raises:
        ValueError: results without a manifest, unfinished, mixed or damaged ones (`DataError`), or a bad number.
        OSError: no such folder, or the page cannot be written.
    """
    folder = Path(folder)
    output = folder / FILE if output is None else Path(output)
    if not 0 <= gallery_items <= MOST_GALLERY:
        raise ValueError(f"a gallery of {gallery_items} items is out of range; give 0 to {MOST_GALLERY}")
    runs = find_runs(folder)
    _check_place(output)
    found = [disagreements(run) for run in runs]
    shown = [items[:gallery_items] for items in found]
    pictures = [
        _pictures(run, items, images, PICTURE_BYTES // len(runs))
        for run, items in zip(runs, shown, strict=True)
    ]
    _write(output, page(runs, found, shown, pictures))
    return Report(output, tuple(runs), tuple(map(len, found)), tuple(map(len, shown)))


def _pictures(
    run: Run, items: Sequence[Disagreement], images: Sequence[str | Path], budget: int
) -> dict[str, Thumbnail]:
    if not items:
        return {}
    paths = find_pictures(run, [Path(folder) for folder in images])
    if paths is None:
        warnings.warn(
            f"the pictures of {run.folder} are not found as the model saw them, so the report shows none; name their "
            "folder with --images",
            stacklevel=3,
        )
        return {}
    return thumbnails({item.image: paths[item.image] for item in items}, budget)


def _check_place(output: Path) -> None:
    if output.is_dir():
        raise IsADirectoryError(f"cannot write the report to {output}: it is a folder; name a file in it")
    if output.suffix.lower() not in (".html", ".htm"):  # or a slip of -o could overwrite results
        raise ValueError(f"cannot write the report to {output}: it is a page; name a file that ends in .html")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"cannot write the report to {output}: there is no folder {output.parent}; make it first"
        )


def _write(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all; what no encoding knows, half a surrogate pair, is a ?."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
