"""Compiles the protocol into expertmesh/v1/ when the distribution is built or installed for development."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def compile_protocol(root: Path) -> list[Path]:
    """Runs protoc over proto/ and returns the generated files; raises RuntimeError where protoc refuses a file."""
    from grpc_tools import protoc

    # protoc looks for its mypy plug-in on the PATH, where a virtual environment that is not activated is missing
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    sources = sorted((root / "proto").rglob("*.proto"))
    well_known = Path(protoc.__file__).parent / "_proto"
    out = str(root)
    arguments = ["protoc", f"-I{root / 'proto'}", f"-I{well_known}", f"--python_out={out}", f"--grpc_python_out={out}"]
    arguments += [f"--mypy_out=quiet:{out}", f"--mypy_grpc_out=quiet:{out}", *map(str, sources)]
    if protoc.main(arguments):
        raise RuntimeError("protoc refused a file in proto/")
    package = root / "expertmesh" / "v1"
    (package / "__init__.py").write_text('"""Generated from proto/expertmesh/v1; do not edit."""\n')
    return sorted(package.glob("*.py*"))


class ProtocolHook(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        build_data["artifacts"].extend(str(path.relative_to(root)) for path in compile_protocol(root))


if __name__ == "__main__":
    for path in compile_protocol(Path(__file__).parent):
        print(path)
