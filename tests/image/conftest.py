from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from built_image import RUNTIME, Image, mounted


@pytest.fixture(scope="session")
def image() -> Iterator[Image]:
    if os.geteuid() or not (shutil.which("buildah") and shutil.which(RUNTIME)):
        pytest.skip(f"running an image needs root, buildah and {RUNTIME}")
    with mounted() as found:
        yield found
