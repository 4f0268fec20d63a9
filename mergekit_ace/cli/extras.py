"""Optional packages of a command, asked for in time and in words."""

from __future__ import annotations

import importlib.util

import click


def require(*packages: str) -> None:
    """End with a message unless the packages are installed.

    Raises:
        click.ClickException: naming those that are not, and how to get them.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise click.ClickException(
            f"this needs {' and '.join(missing)}, which are not installed with mergekit-ace alone. "
            "Run: pip install 'mergekit-ace[report]'"
        )
