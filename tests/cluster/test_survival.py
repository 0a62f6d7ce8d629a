"""Requests whose router dies, on real Ray Serve."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from session_cluster import Cluster

from router_service.survival import LOST, surviving

NAME = "survival"
Ask = Callable[[int, int], AsyncIterator[Any]]
"""An answer in three pieces from one of two replicas; one that is asked dies before the piece of the first number, as
long as fewer than the second number have died."""


@pytest.fixture
def ask(ray_cluster: Cluster, tmp_path: Path) -> Iterator[Ask]:
    from ray import serve

    class Mortal:
        async def answer(self, fatal: int, deaths: int) -> AsyncIterator[str]:
            for piece in range(3):
                if piece == fatal and len(list(tmp_path.iterdir())) < deaths:
                    await asyncio.sleep(0.5)  # the pieces before are on their way
                    (tmp_path / str(os.getpid())).touch()
                    os._exit(1)
                yield f"data: {piece}\n\n"

    deployment = serve.deployment(num_replicas=2, ray_actor_options={"num_cpus": 0})(Mortal)
    handle = serve.run(deployment.bind(), name=NAME, route_prefix=None).options(stream=True)
    yield handle.answer.remote
    serve.delete(NAME)


def collect(ask: Callable[[], AsyncIterator[Any]]) -> list[Any]:
    async def all_of_it() -> list[Any]:
        return [piece async for piece in surviving(ask)]

    return asyncio.run(all_of_it())


def test_another_router_answers_where_the_client_has_seen_nothing(ask: Ask) -> None:
    assert collect(lambda: ask(0, 1)) == [f"data: {piece}\n\n" for piece in range(3)]


def test_a_stream_that_has_begun_ends_with_an_error(ask: Ask) -> None:
    *pieces, last = collect(lambda: ask(2, 1))
    assert pieces == ["data: 0\n\n", "data: 1\n\n"]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == LOST


def test_a_request_that_kills_two_is_not_given_to_a_third(ask: Ask, tmp_path: Path) -> None:
    from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException

    with pytest.raises(OpenAIHTTPException) as refused:
        collect(lambda: ask(0, 3))
    assert refused.value.status_code == 503
    assert len(list(tmp_path.iterdir())) == 2
