"""vLLM's set-up of logging beside Ray Serve's, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from expertmesh.config import EngineSection
from router_service.app import environment

SCRIPT = """
import logging, sys, tempfile
from logging.handlers import MemoryHandler
log = tempfile.NamedTemporaryFile()
serve = logging.getLogger("ray.serve")
serve.addHandler(MemoryHandler(1, target=logging.FileHandler(log.name)))
import vllm.logger
from vllm.config.logging import LoggingConfig
vllm.logger.configure_logging_if_needed(LoggingConfig())  # as an engine does
from router_service.vllm_plugin import register
register()
register()
vllm.logger.init_logger("vllm.engine").info("a message of vLLM")
print(serve.handlers[0].target is not None)
"""


@pytest.mark.parametrize(("ours", "kept"), [(True, "True"), (False, "False")], ids=["as in a router", "as vLLM does"])
def test_serves_log_file_is_kept(ours: bool, kept: str) -> None:
    """Where vLLM no longer closes it, `vllm_logs` can go."""
    given = environment(EngineSection()) if ours else {}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=os.environ | given, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1:] == [kept], done.stderr[-2000:]
    assert (done.stdout + done.stderr).count("a message of vLLM") == 1
