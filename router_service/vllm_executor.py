"""vLLM's worker in the engine's own process, also on a CPU. Written against vLLM 0.32.

On a CPU, vLLM turns the executor "uni" into "mp", since it sets the worker's OpenMP threads by environment variables:
a process more, and an exchange with it in every step that spins on a core. The router sets these variables itself.
"""

from __future__ import annotations

from vllm.v1.executor.uniproc_executor import UniProcExecutor


class InProcessExecutor(UniProcExecutor):  # type: ignore[misc]
    """The same; vLLM leaves classes given by name alone."""
