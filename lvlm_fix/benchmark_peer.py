"""A peer, mitigv (PyPI), on the same model and prompt: side by side, each against its own plain."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from lvlm_fix.benchmark_models import EMBEDDED, QUESTION, Subject
from lvlm_fix.loading import embedded_folder

PEERS = {"mitigv": ("vcd", "m3id", "icd")}
"""By package, what of it runs on transformers 5."""


def interpreter(peer: str, python: str | None) -> str:
    """The interpreter that has the peer.

    Raises:
        ValueError: an unknown peer, no such interpreter, or one that cannot import the peer.
    """
    if peer not in PEERS:
        raise ValueError(f"there is no peer {peer!r}: give {' or '.join(PEERS)}")
    chosen = python or sys.executable
    try:
        found = subprocess.run([chosen, "-c", f"import {peer}"], capture_output=True, text=True, timeout=120)
    except OSError as error:
        raise ValueError(
            f"cannot run --peer-python {chosen}: {error.strerror}; give a Python interpreter"
        ) from error
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(
            f"{chosen} cannot import {peer} ({reason}): install it in a virtual environment of its own and name its "
            "interpreter by --peer-python"
        )
    return chosen


def peer_times(
    peer: str,
    python: str | None,
    subject: Subject,
    new_tokens: int,
    rounds: int,
    clock: str,
) -> dict[str, Any]:
    """Seconds of the peer's methods and of its own plain: `settings` by name, and `versions`.

    One picture a prompt, batch of one; its loop cannot stream, so the time a token takes is that of the answer less
    that of an answer of one token.

    Raises:
        ValueError: see `interpreter`; or the model has no processor, or the peer failed.
    """
    chosen = interpreter(peer, python)
    if subject.processor is None:
        raise ValueError(
            f"{peer} reads pictures and words, and {subject.name} has no processor: time a real model"
        )
    picture = sorted((embedded_folder().parent / "samples").glob("*.png"))[0]
    asked = {
        "model": str(embedded_folder() if subject.name == EMBEDDED else subject.name),
        "picture": str(picture),
        "question": QUESTION,
        "algorithms": PEERS[peer],
        "new_tokens": new_tokens,
        "rounds": rounds,
        "clock": clock,
        "threads": torch.get_num_threads(),
        "device": str(subject.model.device),
        "dtype": str(subject.model.dtype).removeprefix("torch."),
    }
    worker = Path(__file__).with_name("benchmark_peer_worker.py")
    done = subprocess.run([chosen, str(worker)], input=json.dumps(asked), capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"{peer} failed on {subject.name}: {reason}")
    # Some libraries greet on stdout; the result is the last line.
    return json.loads(done.stdout.splitlines()[-1])
