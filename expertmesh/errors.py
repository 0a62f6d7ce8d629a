"""The errors that people see. Each message is one line that names what is wrong and where."""

from __future__ import annotations


class ExpertMeshError(Exception):
    """Base of all errors that the command line prints as one line, with exit code 1."""


class ConfigError(ExpertMeshError):
    """A cluster config that cannot be served."""


class ArtifactError(ExpertMeshError):
    """A checkpoint or an artifact that is missing, damaged or not supported."""


class ClusterError(ExpertMeshError):
    """The running cluster refused or did not answer."""


class Unauthenticated(ExpertMeshError):
    """A caller that does not prove who it is where it must."""


class WireError(ExpertMeshError):
    """A message that breaks the protocol."""


class FingerprintMismatch(ExpertMeshError):
    """A replica serves another model, or another version of it, than the router asks for."""
