"""A RayService's serveConfigV2, text in and text out: what a change does not touch keeps its bytes."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import unified_diff
from typing import Any

from expertmesh.args import EXPERTS_DEPLOYMENT, experts_application
from expertmesh.errors import ConfigError
from expertmesh.kubernetes.bounds import Bounds, read_bounds, with_bounds
from expertmesh.kubernetes.yaml_text import NotEditable, load, rewrite

WHAT = "serveConfigV2"
PREFIX = experts_application("")
Application = Mapping[str, Any]
Applications = Mapping[str, Application]
"""By name, in their order."""


def read_applications(text: str) -> Applications:
    """Raises ConfigError where the text is no Serve config."""
    return _applications(load(text, WHAT))


def write_applications(text: str, wanted: Applications) -> str:
    """The text with these applications; raises ConfigError where it cannot be edited."""
    content = load(text, WHAT)
    before = {**content, "applications": list(_applications(content).values())}
    try:
        return rewrite(text, before, {**content, "applications": list(wanted.values())})
    except NotEditable as error:
        raise ConfigError(f"{WHAT}: {error}") from None


def group_applications(text: str) -> Applications:
    """Group -> its application."""
    found = read_applications(text)
    return {name.removeprefix(PREFIX): one for name, one in found.items() if name.startswith(PREFIX)}


def read_groups(text: str) -> dict[str, Bounds]:
    return {group: read_bounds(experts_override(one)) for group, one in group_applications(text).items()}


def bounds_of(text: str, group: str) -> Bounds:
    """Raises ConfigError naming the groups that there are."""
    known = read_groups(text)
    if group not in known:
        raise ConfigError(f"no group {group!r}; the groups are {', '.join(known) or 'none'}")
    return known[group]


def set_bounds(text: str, group: str, bounds: Bounds) -> str:
    """Raises ConfigError naming the groups that there are."""
    if bounds_of(text, group) == bounds:
        return text
    name, applications = experts_application(group), read_applications(text)
    override = with_bounds(experts_override(applications[name]), bounds)
    return write_applications(text, {**applications, name: with_override(applications[name], override)})


def experts_override(application: Application) -> Mapping[str, Any]:
    """A group's entry in `deployments:`; one with its name alone where there is none."""
    overrides = application.get("deployments") or []
    return next((one for one in overrides if one.get("name") == EXPERTS_DEPLOYMENT), {"name": EXPERTS_DEPLOYMENT})


def with_override(application: Application, override: Mapping[str, Any]) -> Application:
    overrides = application.get("deployments") or []
    changed = [override if one.get("name") == EXPERTS_DEPLOYMENT else one for one in overrides]
    return {**application, "deployments": changed if override in changed else [*changed, override]}


def diff(before: str, after: str, what: str) -> str:
    """Unified, empty where nothing changed."""
    lines = unified_diff(before.splitlines(), after.splitlines(), what, f"{what} (changed)", lineterm="")
    return "".join(f"{line}\n" for line in lines)


def _applications(content: Any) -> Applications:
    found = content.get("applications") if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise ConfigError(f"{WHAT}: holds no list of applications")
    if not all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in found):
        raise ConfigError(f"{WHAT}: an application has no name")
    return {one["name"]: one for one in found}
