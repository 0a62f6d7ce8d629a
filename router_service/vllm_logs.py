"""vLLM's messages without its set-up of logging. Written against vLLM 0.32.

That set-up closes the handlers of all others in the process. In a replica of Ray Serve (2.60) its log file is lost with
them, and a controller that restarts asks for the file's name, gets an error, and stops the router. The router's
environment therefore has VLLM_CONFIGURE_LOGGING=0.
"""

from __future__ import annotations

import logging

from vllm import envs

FORMAT = "%(levelname)s %(asctime)s [%(filename)s:%(lineno)d] %(message)s"


def show() -> None:
    """Has vLLM's messages written to stderr from its level on, where nobody has set up its logger."""
    logger = logging.getLogger("vllm")
    if logger.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(FORMAT, "%m-%d %H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(envs.VLLM_LOGGING_LEVEL)
    logger.propagate = False
