"""docs/kubernetes.md: its commands exist with their flags, its values exist, and what can run here runs."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from kubernetes.utils.quantity import parse_quantity
from kubernetes_testbed import absent

from expertmesh.cli import app
from expertmesh.config import GroupSection
from expertmesh.placement.shapes import shape_of
from tools.chart.helm import CHART, ROOT, helm, objects, template, tool
from tools.chart.values import ExpertPool

GUIDE = (ROOT / "docs" / "kubernetes.md").read_text()
EXAMPLE = CHART / "examples" / "mixtral-8x7b-8-gpus.yaml"
LISTS = {
    "groups": list(GroupSection.model_fields),
    "expertPools": [str(field.alias) for field in ExpertPool.model_fields.values()],
}
KUBECTL = {
    "annotate",
    "apply",
    "cp",
    "create",
    "delete",
    "describe",
    "exec",
    "get",
    "label",
    "logs",
    "patch",
    "port-forward",
    "wait",
}
HELM = {"get", "history", "install", "lint", "repo", "rollback", "template", "test", "uninstall", "upgrade"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, flags=re.MULTILINE | re.DOTALL)


def commands() -> Iterator[str]:
    """Each command of the guide on one line, without what feeds it or what it feeds."""
    for block in blocks("sh"):
        yield from commands_of(block)


def commands_of(block: str) -> list[str]:
    return [line.strip() for line in block.replace("\\\n", " ").splitlines()]


def words(line: str) -> list[str]:
    """Of the first command of a pipe; `watch`, redirections and what runs in the background are taken off."""
    line = re.sub(r"^(export \w+=\$\((?P<made>[^)]*)\)|watch (?P<watched>.*))$", r"\g<made>\g<watched>", line)
    line = re.sub(r"\$\([^)]*\)", "SUBSTITUTED", line)
    return shlex.split(re.split(r" \| | > | &$", line)[0])


def of(program: str) -> list[list[str]]:
    return [found for line in commands() if (found := words(line))[0] == program]


def test_every_command_is_of_a_known_program() -> None:
    known = {"expertmesh", "helm", "kubectl", "tools/image", "docker", "kind", "curl", "cp", "diff", "mkdir", "sed"}
    known |= {"hf", "aws", "git"}
    assert {words(line)[0] for line in commands()} == known


@pytest.mark.parametrize("command", of("expertmesh"), ids=" ".join)
def test_expertmesh_knows_it(command: list[str]) -> None:
    parse(command)


def test_the_command_of_the_job_exists() -> None:
    (job,) = (one for one in objects(template(CHART / "ci" / "gpu-values.yaml")) if one["kind"] == "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (line,) = (line for line in container["args"][0].splitlines() if line.startswith("exec expertmesh"))
    parse(shlex.split(line)[1:])


def test_the_command_of_the_rebalancer_exists() -> None:
    rendered = objects(template(CHART / "ci" / "gpu-values.yaml"))
    (rebalancer,) = (one for one in rendered if one["kind"] == "Deployment")
    (container,) = rebalancer["spec"]["template"]["spec"]["containers"]
    parse([*container["command"], *container["args"]])
    assert "--memory-gib=20" in container["args"], "the largest of its groups'"


def parse(command: list[str]) -> None:
    """By the command line itself: a flag or an argument too many is an error."""
    current: Any = typer.main.get_command(app)
    arguments = command[1:]
    while arguments and arguments[0] in getattr(current, "commands", {}):
        current = current.commands[arguments.pop(0)]
    if command[1] == "loadtest":  # short for `loadtest run`
        current = current.commands["run"]
    current.make_context(current.name, list(arguments), resilient_parsing=True)
    known = {flag for parameter in current.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    assert {one.split("=")[0] for one in arguments if one.startswith("-")} <= known


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Where the guide's commands run."""
    for name in ("helm", "examples/loadtest"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


def run(checkout: Path, line: str) -> str:
    program = Path(sys.executable).parent
    environment = {"PATH": f"{program}:/usr/bin:/bin", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    return shell(line, checkout, environment, line)


def shell(script: str, folder: Path, environment: dict[str, str], line: str, *options: str) -> str:
    """What the script printed; fails the test with the line that it is for."""
    done = subprocess.run(
        ["bash", "-e", *options, "-c", script],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    return done.stdout


def test_the_first_try_needs_what_it_says() -> None:
    """What the demo's pods ask for together, those of each pool as many as there are at first."""
    rendered = objects(template(CHART / "examples" / "demo-cpu.yaml"))
    (cluster,) = (one["spec"]["rayClusterConfig"] for one in rendered if one["kind"] == "RayService")
    (job,) = (one["spec"]["template"]["spec"] for one in rendered if one["kind"] == "Job")
    pods = [(1, cluster["headGroupSpec"]["template"]["spec"]), (1, job)]
    pods += [(group["minReplicas"], group["template"]["spec"]) for group in cluster["workerGroupSpecs"]]
    requests = [(count, one["resources"]["requests"]) for count, pod in pods for one in pod["containers"]]
    requests.append((1, cluster["autoscalerOptions"]["resources"]["requests"]))
    cpus, bytes_ = (
        sum(count * parse_quantity(one[resource]) for count, one in requests) for resource in ("cpu", "memory")
    )
    assert (float(cpus), float(bytes_) / 2**30) == (6.5, 18.5)
    assert "ask for 6.5 CPUs and 18.5 GiB" in (CHART / "examples" / "demo-cpu.yaml").read_text().replace("\n# ", " ")
    assert "with 7 CPUs and 20 GiB to spare" in GUIDE


def test_what_can_run_here_runs(checkout: Path) -> None:
    """Values made, one line changed, Helm's commands rendered, keys made."""
    for command in of("cp"):
        run(checkout, shlex.join(command))
    values = checkout / "values.yaml"
    before = values.read_text()
    (change,) = of("sed")
    run(checkout, shlex.join(change))
    changed = [
        pair for pair in zip(before.splitlines(), values.read_text().splitlines(), strict=True) if len(set(pair)) > 1
    ]
    assert [("max_replicas: 3" in old, "max_replicas: 5" in new) for old, new in changed] == [(True, True)]
    for command in of("helm"):
        if command[1] in ("install", "template", "upgrade") and "helm/expertmesh" in command:
            settings = [argument for flag, argument in itertools.pairwise(command) if flag == "--set"]
            pairs = dict(one.split("=", 1) for one in settings)
            kinds = [one["kind"] for one in objects(template(values, release=command[2], settings=pairs))]
            assert "RayService" in kinds
        elif command[1] == "lint":
            done = run(checkout, shlex.join([str(tool("helm")), *command[1:]]) + " 2>&1")
            assert "0 chart(s) failed" in done and "funcMap fail" not in done
    key = next(line for line in commands() if line.startswith("export OPENAI_API_KEY="))
    assert run(checkout, f"{key}; echo $OPENAI_API_KEY").startswith("em-")


def test_a_plan_keeps_what_groups_get(tmp_path: Path) -> None:
    """Step 9, with the values as `helm get values --all` gives them and the model's manifest alone."""
    name, shape = shape_of("mixtral-8x7b")
    (tmp_path / "manifest.json").write_text(shape.manifest(name).model_dump_json())
    defaults, example = (yaml.safe_load(path.read_text())["cluster"] for path in (CHART / "values.yaml", EXAMPLE))
    described = defaults | {key: defaults[key] | one if isinstance(one, dict) else one for key, one in example.items()}
    (tmp_path / "running.json").write_text(json.dumps(described))
    (command,) = (one for one in of("expertmesh") if one[1] == "plan" and "--directory" in one)
    place = command.index("--directory")
    command = [*command[:place], *command[place + 2 :]]
    program = [str(Path(sys.executable).with_name("expertmesh")), *command[1:], "--json"]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0 and "artifact" in done.stderr
    (tmp_path / "artifact").mkdir()
    (tmp_path / "manifest.json").rename(tmp_path / "artifact" / "manifest.json")
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    groups = json.loads(done.stdout)["plan"]["groups"]
    assert {(one["num_gpus"], json.dumps(one["resources"])) for one in groups} == {(1.0, '{"h100": 1.0}')}


def test_the_plan_prints_what_the_guide_quotes(checkout: Path) -> None:
    mixtral, deepseek = (
        ([line.rstrip() for line in run(checkout, plan).splitlines()], quoted.splitlines())
        for plan, quoted in zip(
            (line for line in commands() if line.startswith("expertmesh plan --shape")), blocks("text"), strict=True
        )
    )
    assert mixtral[1] == mixtral[0]
    printed, quoted = deepseek
    assert quoted == printed[: len(quoted)]
    more = printed[len(quoted) : -1]
    assert {re.sub(r"warm-\S+ +", "", line) for line in more} == {re.sub(r"warm-\S+ +", "", quoted[-1])}
    assert f"and {len(more)} more groups like this one, of 16 experts per layer and 76.1 GiB" in GUIDE


def test_helm_and_kubectl_know_their_commands() -> None:
    assert {command[1] for command in of("helm")} <= HELM
    assert {
        next(one for one in without_namespace(command) if not one.startswith("-")) for command in of("kubectl")
    } <= KUBECTL
    for command in of("helm"):
        flags = {one.split("=")[0] for one in command if one.startswith("--")}
        depth = 2 if command[1] in ("repo", "get") else 1
        said = helm(*command[1 : 1 + depth], "--help")
        assert all(f"{flag} " in said or f"{flag}[" in said or f"{flag}\n" in said for flag in flags), command


def test_hf_knows_the_flags() -> None:
    """Of downloads here and in pods."""
    hf = Path(sys.executable).with_name("hf")
    said = subprocess.run([hf, "download", "--help"], capture_output=True, text=True, check=True, timeout=120).stdout
    downloads = [line[line.index("hf download") :].split() for line in commands() if "hf download" in line]
    assert len(downloads) == 2
    for flag in {one for command in downloads for one in command if one.startswith("-")}:
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", said), flag


def without_namespace(command: list[str]) -> list[str]:
    rest = command[1:]
    return rest[2:] if rest[0] == "-n" else rest


@pytest.mark.kubernetes
@pytest.mark.parametrize("command", of("kubectl"), ids=" ".join)
def test_kubectl_knows_the_flags(command: list[str]) -> None:
    kubectl = tool("kubectl")
    if kubectl is None:
        absent("kubectl is neither on the PATH nor in the cache; tools/kubernetes-tools fetches it")
    rest = without_namespace(command)
    rest = rest[: rest.index("--")] if "--" in rest else rest  # what follows is a command for the pod
    verb = rest[:3] if rest[:2] == ["create", "secret"] else rest[:1]
    said = "".join(
        subprocess.run([kubectl, *arguments], capture_output=True, text=True, check=True).stdout
        for arguments in ([*verb, "--help"], ["options"])
    )
    for flag in (one.split("=")[0] for one in rest if one.startswith("-")):
        assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", said), f"{flag} of {command}"


def test_objects_that_commands_name_exist() -> None:
    """Names of the release's objects, of KubeRay's service and of Secrets that the example's values name."""
    rendered = objects(template(EXAMPLE, release="mixtral", namespace="expertmesh"))
    made = {one["metadata"]["name"] for one in rendered} | {"mixtral-expertmesh-serve-svc"}
    assert set(re.findall(r"mixtral-expertmesh[-a-z]*", GUIDE)) <= made
    values = EXAMPLE.read_text()
    for secret in re.findall(r"create secret generic (\S+)", GUIDE):
        assert secret in values
    labels = {label for one in rendered for label in one["metadata"].get("labels", {}).items()}
    assert ("app.kubernetes.io/component", "prepare") in labels


def test_values_that_it_names_exist() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    named = set(re.findall(rf"`((?:{'|'.join(values)})(?:\.[A-Za-z_\[\]0-9]+)+)(?::[^`]*)?`", GUIDE))
    assert len(named) > 20
    assert [path for path in sorted(named) if not exists(values, path.split("."))] == []


def exists(node: Any, path: list[str]) -> bool:
    """Entries of lists have the keys of their models."""
    for key in path:
        name, is_list, _ = key.partition("[")
        if not isinstance(node, dict) or name not in node:
            return False
        node = dict.fromkeys(LISTS[name]) if is_list else node[name]
    return True
