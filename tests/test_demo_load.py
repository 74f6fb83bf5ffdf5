"""Sixteen visitors at once lose no request and leave no memory behind.

Ten seconds by default; `LVLM_FIX_LOAD_SECONDS=60 pytest tests/test_demo_load.py` is the full minute.
"""

from __future__ import annotations

import os
import threading
import time

import pytest
from demo_server import SAMPLES, serving
from gradio_client import Client, handle_file

from lvlm_fix import LVLM
from lvlm_fix.methods import parse

SECONDS = float(os.environ.get("LVLM_FIX_LOAD_SECONDS", "10"))
VISITORS = 16
PICTURES = ("kitchen", "safari", "street")
SETTINGS = ("none", "vtc_cls(keep=0.5)", "damro", "zipvl")
TOLERATED = 48 * 2**20  # bytes; the server holds some 800 MB, and malloc keeps what it may need again


def crowd(url: str, seconds: float) -> list[tuple[str, str, str]]:
    """What (sample, methods) was answered with, by sixteen visitors who ask until the time is up."""
    said: list[tuple[str, str, str]] = []
    failed: list[BaseException] = []
    stop = time.monotonic() + seconds

    def visit(number: int) -> None:
        try:
            turn = number
            while True:
                visitor = Client(
                    url, verbose=False
                )  # each request is a new visitor's, of whom something is kept
                sample, fix = PICTURES[turn % 3], SETTINGS[turn % len(SETTINGS)]
                picture = handle_file(str(SAMPLES / f"{sample}.png"))
                answer = visitor.predict(picture, "Describe the image.", fix, 64, api_name="/answer")
                said.append((sample, fix, answer["text"]))
                turn += 1
                if time.monotonic() > stop:
                    return
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(VISITORS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 200)
    assert not failed, failed
    assert not any(thread.is_alive() for thread in threads)
    return said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sixteen_visitors_lose_no_request_and_memory_ends_where_it_began(tmp_path):
    lvlm = LVLM()
    expected = {
        (sample, fix): lvlm.ask(SAMPLES / f"{sample}.png", fix=parse(fix)).text
        for sample in PICTURES
        for fix in SETTINGS
    }
    with serving(tmp_path) as server:
        # every code path once, and the pools of threads at their size
        crowd(server.url, min(SECONDS / 2, 10))
        before = _settled(server)
        said = crowd(server.url, SECONDS)
        after = _settled(server)
        log = server.log.read_text()

    print(f"{len(said)} answers in {SECONDS:g} s, memory {before / 2**20:.0f} to {after / 2**20:.0f} MB")
    assert len(said) >= VISITORS
    assert all(text == expected[sample, fix] for sample, fix, text in said)
    assert "Traceback" not in log
    assert after - before < TOLERATED
    assert not list(tmp_path.glob("lvlm-fix-demo-*"))  # the uploads went with the server


def _settled(server) -> int:
    time.sleep(1)
    return server.memory()
