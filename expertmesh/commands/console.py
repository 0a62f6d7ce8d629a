"""Where commands print: progress and remarks on stderr, results on stdout."""

from __future__ import annotations

from rich.console import Console

out = Console()
err = Console(stderr=True)
