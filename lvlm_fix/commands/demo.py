"""`lvlm-fix demo`: the page on which the methods can be tried."""

from __future__ import annotations

import typer

from lvlm_fix.commands.describe import _quietly


def demo(
    host: str = typer.Option("127.0.0.1", help="Where to listen; 0.0.0.0 for every network."),
    port: int = typer.Option(7860, min=1, max=65535, help="Where to listen."),
    model: str = typer.Option("embedded", help="'embedded', a local folder or a hub id."),
    share: bool = typer.Option(False, "--share", help="Open a public tunnel through Gradio's servers."),
) -> None:
    """Open a page that shows the methods at work: plain and fixed side by side, and what the model looked at."""
    import socket

    with socket.socket() as taken:  # before anything slow
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((host, port))
        except OSError as error:
            raise OSError(
                f"cannot listen on {host}:{port} ({error.strerror or error}): choose another --host or --port"
            ) from error
    from lvlm_fix.demo.app import serve

    serve(_quietly(model), host, port, share)
