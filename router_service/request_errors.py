"""Errors for which the request is to blame, answered as vLLM's own server does. Written against Ray 2.60.

Ray Serve LLM calls most of them its own, 500. Its answer to a body that does not fit repeats the body as JSON, which
bytes, NaN and half a surrogate pair are not: 500 again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from ray.exceptions import RayTaskError
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMClientError

log = logging.getLogger(__name__)

# not Exception: what is none of these is a failure of ours and stays 500
TRANSLATED = (VLLMClientError, ValueError, TypeError, OverflowError, NotImplementedError)
"""What vLLM's server translates, but for its own failures. A mistake of ours may be among them: the log tells."""


def handle_request_errors(app: FastAPI) -> None:
    app.add_exception_handler(RequestValidationError, _misfit)
    for kind in TRANSLATED:
        app.add_exception_handler(kind, _translated)


def misfit(errors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The body of the answer to one that does not fit, from pydantic's errors: the first one and where it is."""
    first = errors[0] if errors else {}
    where = ".".join(str(part) for part in first.get("loc", ("body",)))
    message = f"{where}: {first.get('msg', 'not understood')}"
    code = int(HTTPStatus.BAD_REQUEST)
    return {"error": {"message": message, "type": "BadRequestError", "param": where, "code": code}}


async def _misfit(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _json(HTTPStatus.BAD_REQUEST, misfit(error.errors()))


async def _translated(request: Request, error: Exception) -> Response:
    if not isinstance(error, VLLMClientError):
        log.warning("%s %s: called the request's fault", request.method, request.url.path, exc_info=error)
    # what a router raised carries its traceback and address, its cause does not
    made = create_error_response(error.cause if isinstance(error, RayTaskError) else error)
    return _json(made.error.code, made.model_dump())


def _json(status: int, content: object) -> Response:
    return Response(json.dumps(content), status, media_type="application/json")
