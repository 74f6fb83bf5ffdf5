"""`lvlm-fix methods`: what there is to choose from."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import typer


def methods(json_: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """List the methods with their settings, as --fix takes them."""
    from lvlm_fix.methods import METHODS

    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "settings": {field.name: field.default for field in fields(method)},  # type: ignore[arg-type]
            "stages": list(method.stages()),
            "paper": method.paper,
            "summary": (method.__doc__ or "").strip().splitlines()[0],
        }
        for name, method in METHODS.items()
    ]
    if json_:
        print(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "settings (default)", "stages", "what it does")
    for row in rows:
        settings = ", ".join(
            f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in row["settings"].items()
        )
        table.add_row(row["name"], settings, ", ".join(row["stages"]), row["summary"])
    Console().print(table)
