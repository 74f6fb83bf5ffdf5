"""What a run was made with, written beside its results: numbers without it cannot be made again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .processes import Process
from .records import DataError, read_json
from .settings import Decoding, Setting
from .sources import file_hash
from .tasks import Task

if TYPE_CHECKING:
    from lvlm_fix import LVLM

FILE = "manifest.json"
LIBRARIES = ("lvlm-fix", "torch", "transformers", "tokenizers", "numpy", "pillow")
# May differ between the parts of a run: they say where it was made, not what.
FREE = ("command", "created", "environment", "model.name", "late", "measured")
_WEIGHTS = (".safetensors", ".bin", ".json", ".jinja", ".model")


def describe(
    task: Task,
    lvlm: LVLM,
    settings: Sequence[Setting],
    decoding: Decoding,
    batch_size: int,
    model: str | None = None,
    command: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The manifest of a run.

    `model` is the name that it was loaded by; without one its weights are hashed as they are in memory, for
    they may have been changed.
    """
    asked = known_without_model(task, settings, decoding, batch_size)
    return {
        "task": asked.pop("task"),
        "model": {
            "name": model or loaded(lvlm).name_or_path,
            "sha256": model_hash(lvlm, in_memory=model is None),
        },
        "dtype": str(loaded(lvlm).dtype).removeprefix("torch."),
        "device": device_name(lvlm),
        "chat_template": getattr(lvlm.processor, "chat_template", None),
        "prompts": prompts(task, lvlm),
        **asked,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
        "command": list(sys.argv if command is None else command),
        "created": now(),
        "environment": {
            "system": platform.platform(),
            "processors": os.cpu_count(),
            "processes": Process.from_environment().world,
        },
    }


def now() -> str:
    """The time in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def known_without_model(
    task: Task, settings: Sequence[Setting], decoding: Decoding, batch_size: int
) -> dict[str, Any]:
    """The parts of a manifest that are known before a model is loaded."""
    return {
        "task": {"name": task.name, "items": len(task.items), **task.options},
        "decoding": decoding.as_dict(),
        "batch_size": batch_size,
        "settings": [setting.as_dict() for setting in settings],
        "data": dict(task.data),
    }


def loaded(lvlm: LVLM) -> Any:
    """The transformers model in a wrapper."""
    return lvlm.model


def prompts(task: Task, lvlm: LVLM) -> dict[str, Any]:
    """A hash of all that is asked, and the first question as the model reads it."""
    total = hashlib.sha256()
    for item in task.items:
        total.update(json.dumps([item.id, item.image, item.question, item.label]).encode())
    content = [{"type": "image"}, {"type": "text", "text": task.items[0].question}]
    example = lvlm.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return {"sha256": total.hexdigest(), "example": example}


def model_hash(lvlm: LVLM, in_memory: bool = False) -> str:
    """SHA-256 over the names and contents of a model's weights, configuration and tokenizer files.

    A hub id is looked up in the local cache. Where there are no files, or
    `in_memory`, it is over the tensors.
    """
    folder = None if in_memory else _folder(loaded(lvlm))
    total = hashlib.sha256()
    if folder is not None:
        for path in sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS):
            total.update(f"{path.name}\n{file_hash(path)}\n".encode())
        return total.hexdigest()
    import torch

    total.update(loaded(lvlm).config.to_json_string().encode())
    for name, tensor in sorted(loaded(lvlm).state_dict().items()):
        plain = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        total.update(plain.numpy().data)
    return total.hexdigest()


def device_name(lvlm: LVLM) -> str:
    """Kind of the device that computes: `cpu`, or what a GPU calls itself."""
    device = loaded(lvlm).device
    if device.type != "cuda":
        return device.type
    import torch

    return torch.cuda.get_device_name(device)


def claim(out: Path, manifest: Mapping[str, Any], first: bool, wait: Callable[[], bool]) -> None:
    """Put the manifest into `out`, or check that the one there is of the same run.

    Where a run has several processes, the `first` writes it; the others `wait` until it is there.

    Raises `ValueError`, naming the first key that differs, and where results lie there without a manifest.
    """
    path = out / FILE
    while not first and not path.exists() and wait():
        pass
    if path.exists():
        refuse_another(out, manifest)
        return
    if any(out.glob("results-*.jsonl")):
        raise ValueError(
            f"{out} holds results but no {FILE}, so nobody knows of what; give another folder with --out"
        )
    if not first:
        raise TimeoutError(f"{path} was not written in time by the process of rank 0; see what it says")
    write_json(path, manifest)


def refuse_another(out: Path, manifest: Mapping[str, Any], partly: bool = False) -> None:
    """Compare the manifest of a run, or `partly` those keys of it that are given, with the one in `out`, if any.

    Raises `ValueError`, naming the first key that differs, and `OSError` where `out` is no folder.
    """
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file, and a run needs a folder; give another with --out")
    path = out / FILE
    if not path.exists():
        return
    there = read_json(path)
    if not isinstance(there, dict):
        raise DataError(f"{path}: is not a manifest; give another folder with --out")
    if partly:
        there = {key: value for key, value in there.items() if key in manifest}
    difference = first_difference(there, manifest)
    if difference:
        raise ValueError(f"{out} holds results of another run: {difference}; give another folder with --out")


def note(out: Path, **values: Any) -> None:
    """Write keys of `FREE` into the manifest of `out`, as JSON has them; None takes a key away."""
    there = read_json(out / FILE)
    changed = {key: value for key, value in (there | values).items() if value is not None}
    if changed != there:
        write_json(out / FILE, changed)


def first_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """The first key in which two manifests of one run may not differ but do, with both values.

    >>> first_difference({"batch_size": 8, "command": ["a"]}, {"batch_size": 4, "command": ["b"]})
    'batch_size is 8 there and 4 here'
    """
    old, new = dict(_leaves(there)), dict(_leaves(json.loads(json.dumps(here))))
    for key in dict.fromkeys([*new, *old]):
        if old.get(key, "absent") != new.get(key, "absent"):
            return (
                f"{key} is {_short(old.get(key, 'absent'))} there and {_short(new.get(key, 'absent'))} here"
            )
    return None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that appears complete or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _folder(model: Any) -> Path | None:
    name = str(model.name_or_path)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        revision = getattr(model.config, "_commit_hash", None)
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None
    return folder if any(path.suffix in _WEIGHTS[:2] for path in folder.iterdir()) else None


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if key in FREE:
        return
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        yield f"{key}.number", len(value)
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{key}[{index}]")
    else:
        yield key, value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:16]}... ({hashlib.sha256(text.encode()).hexdigest()[:6]})"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
