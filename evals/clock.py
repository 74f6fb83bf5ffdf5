"""The time that a run takes by the clock, and what its answers took, for the manifest."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import manifest as manifests
from .processes import Process
from .records import read_json
from .results import Key, Row
from .settings import Setting
from .summary import speed


class Clock:
    """Runs from when it is made, before the first question of a start, to the last answer.

    Args:
        lacking: how many results lines there are to write.
    """

    def __init__(self, lacking: int) -> None:
        self.lacking = lacking
        self.started, self.since = manifests.now(), time.monotonic()

    def note(self, out: Path, settings: Sequence[Setting], rows: Sequence[Mapping[Key, Row]]) -> None:
        """Write into the manifest what was measured; a start that found all answers there leaves it as it is."""
        measured = read_json(out / manifests.FILE).get("measured")
        if measured and not self.lacking:
            return
        wall = {
            "started": self.started,
            "finished": manifests.now(),
            "wall_seconds": round(time.monotonic() - self.since, 3),
            "new_lines": self.lacking,  # of the results; fewer than all where an earlier start was stopped
            "processes": Process.from_environment().world,
        }
        each = {setting.name: speed(own.values()) for setting, own in zip(settings, rows, strict=True)}
        manifests.note(out, measured={**wall, "settings": each})
