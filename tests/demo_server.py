"""A demo server in a process of its own, and a browser, for the tests that visit it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlm_fix.loading import embedded_folder

SAMPLES = embedded_folder().parent / "samples"


@dataclass(frozen=True)
class Server:
    """A running demo: where it listens, its process, its log and how long it took to come up."""

    url: str
    process: subprocess.Popen
    log: Path
    seconds: float

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a plain request; a refusal is a status, not an exception."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=20) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def call(self, name: str, *arguments: Any) -> tuple[int, bytes]:
        """Status and body of an endpoint asked by hand, as no client of Gradio's would; refused or queued at first."""
        body = json.dumps({"data": arguments}).encode()
        begin = urllib.request.Request(
            f"{self.url}/gradio_api/call/{name}", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(begin, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def answered(self, name: str, *arguments: Any) -> bytes:
        """The same, with the stream of events that it ends in."""
        status, told = self.call(name, *arguments)
        assert status == 200, told
        return self.get(f"/gradio_api/call/{name}/{json.loads(told)['event_id']}")[1]

    def memory(self) -> int:
        """Bytes that the process holds now."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(folder: Path, script: Path | None = None, patience: float = 150) -> Iterator[Server]:
    """`lvlm-fix demo` on a free port, or a script as a Space runs it, while the `with` lasts; `folder` has its log."""
    port, log = free_port(), folder / "server.log"
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TMPDIR": str(folder),
        "XDG_CACHE_HOME": str(folder),
        "GRADIO_SERVER_PORT": str(port),
    }
    command = [sys.executable, "-m", "lvlm_fix", "demo", "--port", str(port)]
    if script is not None:
        command = [sys.executable, str(script)]
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder
        )
        try:
            while not _answers(port):
                if process.poll() is not None or time.monotonic() - started > patience:
                    raise RuntimeError(f"the demo did not start: {log.read_text()}")
                time.sleep(0.2)
            yield Server(f"http://127.0.0.1:{port}", process, log, time.monotonic() - started)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OFFLINE = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--no-first-run"]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
DONE = 60_000  # milliseconds, on a machine that others use too


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of Debian's, without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as starter:
        running = starter.chromium.launch(executable_path=CHROMIUM, args=OFFLINE)
        yield running
        running.close()


@contextmanager
def visiting(browser: Any, server: Server) -> Iterator[Callable[..., Any]]:
    """Opens the page; at the end nothing may have been asked of another host, and no script may have failed."""
    contexts: list[Any] = []
    elsewhere: list[str] = []
    failures: list[str] = []

    def open_page(query: str = "", viewport: Any = DESKTOP, scheme: str = "light") -> Any:
        context = browser.new_context(viewport=viewport, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(DONE)
        page.on("request", lambda one: elsewhere.append(one.url) if _leaves(one.url, server.url) else None)
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.goto(server.url + "/" + query)
        page.wait_for_selector("#code .cm-line")
        return page

    try:
        yield open_page
    finally:
        for context in contexts:
            context.close()
    assert not elsewhere and not failures


def compare(page: Any) -> None:
    """Press Compare, and wait until every word can be clicked."""
    page.click("#run")
    page.wait_for_selector("#fixed button.word")


def _leaves(url: str, home: str) -> bool:
    return not url.startswith((home, "data:", "blob:", home.replace("http", "ws", 1)))


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/config", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
