"""The measurements that ship, what the presets are by them, and under which conditions they were made."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

BENCHMARKS = ("chair", "pope")
"""Measurements that the page shows; others that ship are of other things."""

PLAIN = "none"
Summary = dict[str, Any]

SCORED_AS: dict[str, str] = {
    "vtc_cls(keep=0.5)": "vtc_cls(keep=72)",
    "vtc_cls(keep=0.33)": "vtc_cls(keep=48)",
    "vtc_cls(keep=0.5),zipvl(evict=True)": "vtc_cls(keep=72),zipvl(evict=True)",
    "zipvl(evict=True)": "zipvl(evict=True)",
}
"""Settings of the page as they were measured: 72 and 48 are of the embedded model's 144 tokens."""

RULES: dict[str, tuple[str, Callable[[Summary, dict[str, Any]], float]]] = {
    "least hallucination": (
        "the smallest share of made-up objects (CHAIRi)",
        lambda _, one: _chair(one, "CHAIRi"),
    ),
    "fastest": (
        "the shortest time an answer",
        lambda run, one: one["seconds_per_answer"] / _plain(run)["seconds_per_answer"],
    ),
    "balanced": (
        "the best F1 at naming what is there and nothing else",
        lambda _, one: -_chair(one, "f1"),
    ),
}
"""By preset, in words and as a number that is to be small: how it is chosen among the measured settings."""


def summaries(names: Sequence[str] = BENCHMARKS) -> list[Summary]:
    """The measurements that ship, one a benchmark, each with its `manifest` where that ships too."""
    shipped = files("lvlm_fix.assets") / "scores"
    found = []
    for name in names:
        summary, manifest = shipped / name / "summary.json", shipped / name / "manifest.json"
        if summary.is_file():
            told = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
            found.append(json.loads(summary.read_text(encoding="utf-8")) | {"manifest": told})
    return found


def winner(preset: str, runs: Sequence[Summary]) -> str:
    """The measured setting that a preset's rule chooses.

    Raises:
        ValueError: no run of CHAIR holds a setting but the plain one.
    """
    rule = RULES[preset][1]
    ranked = [
        (rule(run, one), one["name"])
        for run in runs
        if run["task"] == "chair"
        for one in run["settings"]
        if one["name"] != PLAIN
    ]
    if not ranked:
        raise ValueError("no measurement of CHAIR ships: run `lvlm-fix eval chair` into assets/scores/chair")
    return min(ranked)[1]


def conditions(summary: Summary) -> str:
    """How the times of a run were taken.

    >>> conditions({"manifest": {"batch_size": 32, "device": "cpu", "environment": {"processors": 2}}})
    'in batches of 32 on a CPU with 2 cores'
    """
    manifest = summary.get("manifest", {})
    size, device = manifest.get("batch_size"), manifest.get("device", "")
    cores = manifest.get("environment", {}).get("processors")
    where = (
        f"a CPU with {cores} cores" if device == "cpu" and cores else "a CPU" if device == "cpu" else device
    )
    said = [f"in batches of {size}" if size else "", f"on {where}" if where else ""]
    return " ".join(part for part in said if part) or "under conditions that were not kept"


def preset_of(measured: str, presets: dict[str, str]) -> str | None:
    """What the page calls a measured setting, where it is a preset."""
    names = {SCORED_AS.get(fix, fix): name for name, fix in presets.items()}
    return names.get(measured)


def _plain(run: Summary) -> dict[str, Any]:
    return next(one for one in run["settings"] if one["name"] == PLAIN)


def _chair(setting: dict[str, Any], metric: str) -> float:
    return setting["splits"]["all"][metric]["value"]
