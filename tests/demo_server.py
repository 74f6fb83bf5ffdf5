"""A demo server in a process of its own, for the tests that visit it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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

    def memory(self) -> int:
        """Bytes that the process holds now."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(folder: Path, patience: float = 150) -> Iterator[Server]:
    """`lvlm-fix demo` on a free port, until the `with` is left; its log stands in `folder`."""
    port, log = free_port(), folder / "server.log"
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TMPDIR": str(folder),
        "XDG_CACHE_HOME": str(folder),
    }
    command = [sys.executable, "-m", "lvlm_fix", "demo", "--port", str(port)]
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


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/config", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
