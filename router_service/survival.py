"""Answers that outlive the router that began them. Written against Ray 2.60.

Ray Serve sends a request on where a replica has gone before it took it; where the replica dies with it, the call fails.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from ray.exceptions import RayActorError
from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException

ROUTERS = 2
"""How many may die with one request, in case it is the request that they die of."""
UNAVAILABLE = 503
LOST = "the router that worked on this request has died; please send it again"


async def surviving(ask: Callable[[], AsyncIterator[Any]]) -> AsyncIterator[Any]:
    """The pieces of an answer: a body, or a stream's chunks or lists of them.

    Where the router dies before the first piece, so that the client has seen nothing, `ask` is called again, for
    `ROUTERS` times in all. A stream that has begun ends with an error as its last event, since only the client knows
    whether it can do with what it has. Raises OpenAIHTTPException with 503 where each of them has died.
    """
    for _ in range(ROUTERS):
        begun = False
        try:
            async for piece in ask():
                begun = True
                yield piece
            return
        except RayActorError:
            if begun:
                yield _last_event()
                return
    raise OpenAIHTTPException(message=LOST, status_code=UNAVAILABLE, type="ServerError")


def _last_event() -> str:
    error = {"message": LOST, "type": "ServerError", "param": None, "code": UNAVAILABLE}
    return f"data: {json.dumps({'error': error})}\n\n"
