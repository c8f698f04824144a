"""The ``foxlm`` command. Importing it costs no more than typer: commands import what they need when they run."""

from foxlm.cli.app import app, main

__all__ = ["app", "main"]
