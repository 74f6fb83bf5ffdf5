"""For tests of reports: runs whose answers are given, and pages taken apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from lvlm_fix.evals.manifest import write_json
from lvlm_fix.evals.records import write_lines
from lvlm_fix.evals.results import results_file
from lvlm_fix.evals.settings import Setting
from lvlm_fix.evals.summary import summarize
from lvlm_fix.evals.tasks import Item, Task

VOID = {"meta", "img", "br", "wbr"}
Answer = Callable[[Item, int], str]


def answered(
    out: Path,
    task: Task,
    answers: dict[str, Answer],
    seeds: Sequence[int] = (0,),
    images: Path | None = None,
    score: Callable[[Item, str], dict] | None = None,
) -> Path:
    """A folder as `lvlm-fix eval` leaves it, of answers to a task's items by setting and seed.

    `score` makes the late columns of the task.
    """
    out.mkdir(parents=True, exist_ok=True)
    settings = [Setting(name) for name in answers]
    tables = []
    for number, (setting, answer) in enumerate(zip(settings, answers.values(), strict=True), 1):
        rows = {}
        for seed in seeds:
            for item in task.items:
                said = answer(item, seed)
                row = {"id": item.id, "seed": seed, "split": item.split, "image": item.image}
                row |= {"question": item.question, "answer": said, **task.judge(item, said)}
                row |= score(item, said) if score else {}
                row |= {"tokens": len(said.split()) + 1, "seconds": 0.01 * number, "memory": 2**30}
                rows[seed, item.id] = row
        write_lines(results_file(out, setting.slug), rows.values())
        tables.append(rows)
    decoding = {"max_new_tokens": 16, "do_sample": len(seeds) > 1, "num_beams": 1}
    command = ["lvlm-fix", "eval", task.name, *(["--images", str(images)] if images else [])]
    manifest = {
        "task": {"name": task.name, "items": len(task.items), **task.options},
        "model": {"name": "models/tiny & new", "sha256": "0" * 64},
        "dtype": "float32",
        "device": "cpu",
        "chat_template": "{{ '<image>' }}",
        "prompts": {"sha256": "1" * 64, "example": "USER: <image>\nIs there?"},
        "decoding": decoding | ({"seeds": list(seeds), "temperature": 0.7} if len(seeds) > 1 else {}),
        "batch_size": 4,
        "settings": [setting.as_dict() for setting in settings],
        "data": dict(task.data),
        "versions": {"python": "3.11.7", "torch": "2.15.0"},
        "command": command,
        "created": "2026-11-24T01:46:36Z",
        "environment": {"system": "Linux", "processors": 2, "processes": 1},
        "measured": {"wall_seconds": 75.0, "new_lines": 1234, "processes": 2},
        **({"late": task.late_options} if score else {}),
    }
    write_json(out / "manifest.json", manifest)
    write_json(out / "summary.json", summarize(task, settings, tables, seeds, resamples=400))
    return out


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    """Change a JSON file in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@dataclass
class Node:
    """An element of a page."""

    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    children: list[Node | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str = "", class_: str = "") -> Iterator[Node]:
        """Elements inside of a tag and of a class, in the page's order."""
        for child in self.children:
            if isinstance(child, Node):
                if (not tag or child.tag == tag) and (not class_ or class_ in child.classes):
                    yield child
                yield from child.all(tag, class_)

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()

    def one(self, tag: str = "", class_: str = "") -> Node:
        return next(self.all(tag, class_))


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Node("")]

    def handle_starttag(self, tag, attrs) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"<{tag}> has an attribute twice"
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data) -> None:
        self.open[-1].children.append(data)


def parse(text: str) -> Node:
    """The page as a tree; every element must be closed where it was opened."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert len(reader.open) == 1, f"<{reader.open[-1].tag}> is not closed"
    return reader.open[0]
