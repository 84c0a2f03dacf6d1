"""Entry point of ``python -m engines``."""

from engines.cli import app

app(prog_name="python -m engines")
