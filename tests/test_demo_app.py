"""How the demo is started: by the command, and as a Hugging Face Space."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from importlib.resources import files
from types import SimpleNamespace

from demo_server import serving

from lvlm_fix.demo import app


def test_what_is_kept_of_visitors_is_bounded():
    given: dict[str, object] = {}
    app.launch(SimpleNamespace(launch=lambda **options: given.update(options)))
    assert given["state_session_capacity"] == app.SESSIONS <= 500


def test_a_copied_app_file_runs_as_a_space_does(tmp_path):
    script = tmp_path / "app.py"
    shutil.copy(str(files("lvlm_fix.demo") / "app.py"), script)
    with serving(tmp_path, script=script) as space:
        assert b"there is no picture" in space.answered("answer", None, "Why?", "none", 8)


def test_the_command_refuses_a_port_in_use_before_it_loads(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ran = subprocess.run(
            [sys.executable, "-m", "lvlm_fix", "demo", "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert ran.returncode == 1 and ran.stdout == ""
    assert ran.stderr.strip().startswith(f"lvlm-fix: cannot listen on 127.0.0.1:{port}")
    assert "\n" not in ran.stderr.strip()


def test_the_space_has_what_a_space_needs():
    text = (files("lvlm_fix.demo") / "README.md").read_text(encoding="utf-8")
    head = dict(line.split(": ", 1) for line in text.split("---")[1].strip().splitlines())
    assert head["sdk"] == "gradio" and head["app_file"] == "app.py"
    assert (files("lvlm_fix.demo") / head["app_file"]).is_file()
    assert json.loads(head["pinned"]) is False
