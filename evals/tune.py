"""Searches a method's hyper-parameters on a validation part of the images, and reports on the rest.

The best of many settings looks better than it is on the images it was chosen by. So the choice reads the
validation part only, and what is claimed of it comes from images that no setting was compared on.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .manifest import write_json
from .records import read_json
from .runner import PATIENCE, SUMMARY, run
from .settings import PLAIN, Decoding, Setting
from .sources import pictures_hash
from .summary import MEAN, NO_DIFFERENCE, SIGNIFICANCE
from .tasks import Task

if TYPE_CHECKING:
    from lvlm_fix.methods import Method

Grid = Mapping[str, Sequence[Any]]

# What each paper tunes, around its own values. `keep` is the paper's 64, 128 and 192 of 576 tokens, and half of
# them, as fractions, for models of any number of image tokens.
GRIDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "damro": {"alpha": (0.1, 0.5, 1.0, 2.0), "topk": (4, 10)},
    "vtc_cls": {"keep": (0.111, 0.222, 0.333, 0.5), "start_layer": (-4, -2)},
    "var": {"rho": (0.5, 0.8, 0.9), "p": (0.4, 0.6, 0.8)},
    "zipvl": {"tau": (0.95, 0.975, 0.99), "evict": (False, True)},
}
METRICS = {"pope": "f1", "chair": "CHAIRi"}
GUARDED = ("CHAIRs", "CHAIRi")  # metrics that saying less makes better
RECALL_DROP = 2.0  # percent points
_POLL = 0.2


@dataclass(frozen=True)
class Objective:
    """What the best setting is best in.

    Attributes:
        metric: one of the task's.
        place: the split it is read from, or the mean over the splits.
        direction: 1 where more is better, -1 less.
        recall_drop: how far recall may lie below the plain model's, in the units of the metric; None if any.
    """

    metric: str
    place: str
    direction: int
    recall_drop: float | None = None

    @classmethod
    def of(cls, task: Task, metric: str | None = None, recall_drop: float = RECALL_DROP) -> Objective:
        """The task's own objective, or one of its other metrics.

        Raises `ValueError` for a task without one, and a metric that it does not have or that has no better.
        """
        metric = metric or METRICS.get(task.name)
        if not metric or not task.better.get(metric):
            known = ", ".join(name for name, direction in task.better.items() if direction)
            raise ValueError(f"{task.name} cannot be tuned by {metric!r}; choose one of {known}")
        if not recall_drop >= 0:
            raise ValueError(f"the recall drop is {recall_drop}; give 0 or more percent points")
        splits = list(dict.fromkeys(item.split for item in task.items))
        place = MEAN if len(splits) > 1 else splits[0]
        return cls(metric, place, task.better[metric], recall_drop if metric in GUARDED else None)

    def __str__(self) -> str:
        words = f"{'highest' if self.direction > 0 else 'lowest'} {self.metric}"
        words += " (mean of the splits)" if self.place == MEAN else ""
        if self.recall_drop is not None:
            words += f" with recall at most {self.recall_drop:g} points below plain"
        return words

    def read(self, setting: Mapping[str, Any], metric: str | None = None) -> dict[str, Any]:
        """The estimate of the metric, or of another, in a setting of a summary."""
        return setting["splits"][self.place][metric or self.metric]

    def allowed(self, setting: Mapping[str, Any], plain: Mapping[str, Any]) -> bool:
        """Whether a setting keeps enough recall."""
        if self.recall_drop is None:
            return True
        return self.read(plain, "recall")["value"] - self.read(setting, "recall")["value"] <= self.recall_drop

    def best(self, settings: Sequence[Mapping[str, Any]]) -> int:
        """Index of the best setting of a summary, whose first is plain; of equals the first."""
        allowed = [index for index, one in enumerate(settings) if self.allowed(one, settings[0])]
        return max(allowed, key=lambda index: self.direction * self.read(settings[index])["value"])


def tune(
    task: Task,
    method: str | Method,
    grid: Grid | None = None,
    model: str | Path = "embedded",
    out: str | Path = "tune",
    *,
    metric: str | None = None,
    recall_drop: float = RECALL_DROP,
    validation: float = 0.5,
    seed: int = 0,
    decoding: Decoding | None = None,
    batch_size: int = 16,
    dtype: str = "auto",
    device_map: str | None = None,
    command: Sequence[str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Run every setting of a grid on the validation part, then the best one and plain on the test part.

    Started again with the same arguments it goes on where it was. Plain competes too: if nothing is better on
    the validation part, nothing is chosen, and only plain runs on the test part.

    Args:
        task: what to ask; its images are divided, see `divide`.
        method: one method, fields that the grid leaves alone as they stay.
        grid: field -> values, all combinations of which are tried; by default that of `GRIDS`.
        model: what `lvlm_fix.load` takes, or an `LVLM`.
        out: folder, of `validation/` and `test/` with results and manifest, and of `tune.json`.
        metric: what the best is best in; by default F1 of POPE, mean over splits, and CHAIRi of CHAIR.
        recall_drop: of CHAIRi and CHAIRs, by how many percent points recall may be less than plain's.
        validation: share of the images to choose by.
        seed: of the division.
        decoding, batch_size, dtype, device_map, command, progress: as of `run`.

    Returns:
        What `tune.json` holds; of several processes only the first has it, and the others return {}.

    Raises:
        ValueError: a bad grid, metric or division, or `out` holds another search.
        OSError: files cannot be read or written.
    """
    objective = Objective.of(task, metric, recall_drop)
    chosen_from = settings_of(method, grid)
    parts = divide(task, validation, seed)
    out = Path(out)

    def ran(part: str, settings: Sequence[Setting]) -> dict[str, Any]:
        return run(
            parts[part], model, settings, out / part, decoding=decoding, batch_size=batch_size, dtype=dtype,
            device_map=device_map, command=command, progress=progress,
        )  # fmt: skip

    seen = ran("validation", chosen_from) or _of_first_process(out / "validation" / SUMMARY)
    best = objective.best(seen["settings"])
    settings = [Setting(PLAIN), *chosen_from]
    tested = ran("test", [settings[best]] if best else [])
    if not tested:
        return {}
    found = {
        "task": task.name,
        "method": settings[-1].methods[0].name,
        "objective": {"text": str(objective), "metric": objective.metric, "split": objective.place},
        "images": {"validation": seen["images"], "test": tested["images"], "seed": seed},
        "chosen": settings[best].name,
        "reason": _reason(objective, seen, best),
        "validation": [_line(objective, seen, index) for index in range(len(settings))],
        "test": [_line(objective, tested, index) for index in range(len(tested["settings"]))],
        "comparison": _comparison(task, objective, tested) if best else None,
    }
    write_json(out / "tune.json", found)
    return found


def settings_of(method: str | Method, grid: Grid | None = None) -> list[Setting]:
    """A method at every point of a grid, named as `--fix` spells it.

    >>> [setting.name for setting in settings_of("vtc_cls(start_layer=-2)", {"keep": [36, 72]})]
    ['vtc_cls(start_layer=-2,keep=36)', 'vtc_cls(start_layer=-2,keep=72)']

    Raises `ValueError` for several methods, an unknown or empty field of the grid, a value that does not fit,
    and a point that is there twice.
    """
    from lvlm_fix.methods import parse

    if isinstance(method, str):
        parsed = parse(method)
        if len(parsed) != 1:
            raise ValueError(f"{method!r} holds {len(parsed)} methods; tune one at a time")
        method = parsed[0]
    known: Any = fields(method)  # type: ignore[arg-type]
    grid = GRIDS.get(method.name, {}) if grid is None else grid
    unknown = grid.keys() - {field.name for field in known}
    if unknown or not grid or not all(grid.values()):
        names = ", ".join(field.name for field in known)
        raise ValueError(f"the grid of {method.name} is {dict(grid)}; give values for some of {names}")
    fixed = {
        field.name: getattr(method, field.name)
        for field in known
        if field.name not in grid and getattr(method, field.name) != field.default
    }
    settings = []
    for point in itertools.product(*grid.values()):
        values = dict(zip(grid, point, strict=True))
        spelled = ",".join(f"{name}={value!r}" for name, value in (fixed | values).items())
        spelled = f"{method.name}({spelled})"
        settings.append(Setting(spelled, tuple(parse(spelled))))
    if len({setting.methods for setting in settings}) < len(settings):
        raise ValueError(f"the grid of {method.name} holds a value twice: {dict(grid)}; give it once")
    return settings


def divide(task: Task, validation: float = 0.5, seed: int = 0) -> dict[str, Task]:
    """A task's images in two parts, `validation` and `test`, with all questions about each.

    Which image falls in which part depends on its name and the seed: images are put in the order of a hash of
    both, and the first `validation` of them taken.

    Raises `ValueError` where a part would have no image.
    """
    images = sorted(
        {item.image for item in task.items},
        key=lambda image: hashlib.sha256(f"{seed}\n{image}".encode()).digest(),
    )
    count = round(validation * len(images)) if 0 < validation < 1 else 0
    if not 0 < count < len(images):
        raise ValueError(
            f"{validation:g} of {len(images)} images leaves one part empty; give a share between 0 and 1, and "
            "two images or more"
        )
    first = set(images[:count])
    parts = {}
    for name, wanted in (("validation", True), ("test", False)):
        items = tuple(item for item in task.items if (item.image in first) is wanted)
        parts[name] = replace(task, items=items, data={**task.data, "images": pictures_hash(items)})
    return parts


def _of_first_process(path: Path) -> dict[str, Any]:
    """What the first of several processes makes of the results of all of them."""
    end = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"{path} was not written in time by the process of rank 0; see what it says")
        time.sleep(_POLL)
    return read_json(path)


def _line(objective: Objective, summary: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A setting's numbers, as `tune.json` has them."""
    setting = summary["settings"][index]
    return {
        "setting": setting["name"],
        **objective.read(setting),
        "allowed": objective.allowed(setting, summary["settings"][0]),
        "metrics": setting["splits"][objective.place],
        "tokens_per_second": setting["tokens_per_second"],
    }


def _entries(objective: Objective, summary: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    return [
        entry
        for entry in summary["comparisons"]
        if entry["setting"] == name and entry["split"] == objective.place
    ]


def _reason(objective: Objective, summary: Mapping[str, Any], best: int) -> str:
    """Why the best setting of the validation part is the best, and how sure that is."""
    if not best:
        return f"no setting beats plain on the validation part ({objective})"
    name = summary["settings"][best]["name"]
    own = next(e for e in _entries(objective, summary, name) if e["metric"] == objective.metric)
    tried = len(summary["settings"]) - 1
    sure = f"p {own['p_holm']:.2g}, corrected for {tried} setting{'s' * (tried > 1)} and their splits"
    words = (
        "significantly better than plain there" if own["significant"] else "not significantly better there"
    )
    return f"{objective} on the validation part; {words} ({sure})"


def _comparison(task: Task, objective: Objective, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The paired test of the chosen setting against plain on the test part.

    Setting, metric and split were decided before these images were looked at, so this one p needs no correction.
    """
    entries = _entries(objective, summary, summary["settings"][1]["name"])
    own = dict(next(entry for entry in entries if entry["metric"] == objective.metric))
    del own["p_holm"]
    own["significant"] = own["p"] < SIGNIFICANCE
    better = own["difference"] * task.better[objective.metric] > 0
    own["verdict"] = ("better" if better else "worse") if own["significant"] else NO_DIFFERENCE
    own["others"] = [entry for entry in entries if entry["metric"] != objective.metric]
    return own
