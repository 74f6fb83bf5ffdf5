"""`lvlm-fix methods`: what there is to choose from."""

from __future__ import annotations

import json

import typer


def methods(json_: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """List the methods with their settings, as --fix takes them."""
    from lvlm_fix.methods import METHODS

    rows = [
        {
            "name": name,
            "settings": {key: field.default for key, field in method.__dataclass_fields__.items()},  # type: ignore[attr-defined]
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
