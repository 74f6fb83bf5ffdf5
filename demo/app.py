"""Starts the demo: `lvlm-fix demo` calls `serve`; as a Hugging Face Space this file is run as it is."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
from importlib.resources import files
from typing import Any

QUEUE = 32  # requests that may wait; further ones are told so
SESSIONS = 200  # visitors of whom something is kept, some 0.3 MB each; the one seen longest ago makes room
HOST, PORT = "127.0.0.1", 7860


def build(model: str = "embedded") -> Any:
    """The page over a freshly loaded model, with its queue: a `gradio.Blocks` that is not launched yet.

    Raises:
        OSError: the model cannot be loaded.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported: it asks its maker for news
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from lvlm_fix.demo.page import Page
    from lvlm_fix.demo.service import Service

    blocks = Page(Service(model)).blocks
    # no request goes past the queue, or many at once could each decode a picture
    blocks.queue(max_size=QUEUE, default_concurrency_limit=8, api_open=False)
    return blocks


def launch(blocks: Any, host: str = HOST, port: int = PORT, share: bool = False) -> None:
    """Serve until it is interrupted.

    Raises:
        OSError: the port is taken.
    """
    import gradio as gr

    from lvlm_fix.demo import bounds

    system = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    blocks.launch(
        server_name=host,
        server_port=port,
        share=share,
        # fonts of the system: the default theme fetches its own from Google
        theme=gr.themes.Default(
            primary_hue="blue", font=system, font_mono=["ui-monospace", "monospace"]
        ).set(  # the default greys and blues are too light to read
            block_info_text_color="*neutral_600",
            block_info_text_color_dark="*neutral_300",
            block_label_text_color="*neutral_700",
            block_title_text_color="*neutral_700",
            color_accent="*primary_700",
            button_primary_background_fill="*primary_700",
            button_primary_background_fill_dark="*primary_700",
            button_primary_background_fill_hover="*primary_800",
            button_primary_background_fill_hover_dark="*primary_800",
            slider_color="*primary_600",
        ),
        css=(files("lvlm_fix.demo") / "page.css").read_text(encoding="utf-8"),
        allowed_paths=[],
        blocked_paths=[str(files("lvlm_fix")), str(files("lvlm_fix.assets")), str(files("lvlm_fix.demo"))],
        max_file_size=bounds.MOST_BYTES,
        footer_links=["api", "settings"],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        state_session_capacity=SESSIONS,
        ssr_mode=False,
        # our own errors are told all the same; those of others may hold paths of the server
        show_error=False,
        quiet=True,
    )


def serve(model: str = "embedded", host: str = HOST, port: int = PORT, share: bool = False) -> None:
    """Load the model and serve the page, until it is interrupted.

    Uploads go to a folder of this process, which is removed at the end: Gradio's own is shared by all of a machine's
    servers, and its file routes read all of it.

    Args:
        model: `embedded`, a local folder or a hub id.
        host, port: where to listen.
        share: open a public tunnel through Gradio's servers.

    Raises:
        OSError: the model cannot be loaded, or the port is taken.
    """
    uploads = tempfile.mkdtemp(prefix="lvlm-fix-demo-")
    os.environ["GRADIO_TEMP_DIR"] = uploads
    if (
        threading.current_thread() is threading.main_thread()
    ):  # a service is stopped by SIGTERM: clean up then, too
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        blocks = build(model)
        print(f"lvlm-fix demo on http://{host}:{port}, stop with Ctrl+C", flush=True)
        launch(blocks, host, port, share)
    finally:
        shutil.rmtree(uploads, ignore_errors=True)


def __getattr__(name: str) -> Any:
    """`demo`, which Gradio's tools look for, is built when someone asks: importing this file loads no model."""
    if name != "demo":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()["demo"] = build(os.environ.get("LVLM_FIX_MODEL", "embedded"))
    return globals()["demo"]


if __name__ == "__main__":
    serve(
        os.environ.get("LVLM_FIX_MODEL", "embedded"),
        os.environ.get("GRADIO_SERVER_NAME", HOST),
        int(os.environ.get("GRADIO_SERVER_PORT", PORT)),
    )
