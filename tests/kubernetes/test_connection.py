"""Which API server is asked, and what is said of a kubeconfig that cannot be used. Nothing here is asked of one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from expertmesh.errors import ConfigError
from expertmesh.kubernetes.connection import connect

IN_POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}
BEGINS = "holds no keys; a kubeconfig begins with `apiVersion: v1` and `kind: Config`"


def write(file: Path, cluster: str, *, current: str = "a") -> Path:
    """Two contexts, `a` with a namespace and `b` with none, of an API server of the cluster's name."""
    contexts = {"a": {"namespace": f"in-{cluster}"}, "b": {}}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": cluster, "cluster": {"server": f"http://{cluster}:1"}}],
        "users": [{"name": "user", "user": {"token": f"token-of-{cluster}"}}],
        "contexts": [
            {"name": name, "context": {"cluster": cluster, "user": "user", **more}} for name, more in contexts.items()
        ],
        "current-context": current,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content))
    return file


class Places:
    """Where a kubeconfig may stand, and a pod's account."""

    def __init__(self, folder: Path) -> None:
        self.named, self.variable = folder / "named", folder / "variable"
        self.home = folder / ".kube/config"
        self.account = folder / "account"

    def mount_account(self) -> None:
        self.account.mkdir()
        (self.account / "token").write_text("token-of-account")
        (self.account / "ca.crt").write_text("certificate")
        (self.account / "namespace").write_text("own\n")

    def found(
        self,
        kubeconfig: Path | None = None,
        environ: Mapping[str, str] = IN_POD,
        context: str | None = None,
        namespace: str | None = None,
    ) -> tuple[str, str, str]:
        """URL, namespace and token."""
        made = connect(kubeconfig, context, namespace, self.account, environ)
        (asked,) = made.api.configuration.auth_settings().values()
        return made.url, made.namespace, asked["value"].split()[-1]


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    monkeypatch.setenv("HOME", str(tmp_path))
    return Places(tmp_path)


def test_the_first_that_there_is(places: Places) -> None:
    """--kubeconfig, $KUBECONFIG, ~/.kube/config, the pod's account."""
    places.mount_account()
    assert places.found() == ("https://10.0.0.1:443", "own", "token-of-account")
    write(places.home, "home")
    assert places.found() == ("http://home:1", "in-home", "token-of-home")
    variable = IN_POD | {"KUBECONFIG": str(write(places.variable, "variable"))}
    assert places.found(environ=variable) == ("http://variable:1", "in-variable", "token-of-variable")
    named = write(places.named, "named")
    assert places.found(named, variable) == ("http://named:1", "in-named", "token-of-named")
    assert places.found(environ=IN_POD | {"KUBECONFIG": ""})[0] == "http://home:1"


def test_context_and_namespace(places: Places) -> None:
    file = write(places.named, "named")
    assert places.found(file, context="b")[1] == "default"
    assert places.found(file, context="b", namespace="said")[1] == "said"
    assert places.found(file, namespace="said")[1] == "said"
    assert places.found(write(places.named, "named", current="b"))[1] == "default"


def test_several_files(places: Places) -> None:
    """As kubectl reads them: who comes first is believed, and one that is not there is passed over."""
    write(places.named, "one", current="")
    write(places.variable, "two", current="b")
    absent = str(places.home)
    both = {"KUBECONFIG": os.pathsep.join([absent, str(places.named), str(places.variable)])}
    assert places.found(environ=both) == ("http://one:1", "default", "token-of-one")
    assert places.found(environ=both, context="a")[1] == "in-one"


def test_none_at_all(places: Places) -> None:
    with pytest.raises(ConfigError, match=rf"^no kubeconfig at {places.home}, and this is no pod with a ServiceAc"):
        places.found()
    with pytest.raises(ConfigError, match=rf"^no kubeconfig at {places.named}$"):
        places.found(places.named)
    write(places.home, "home")
    places.mount_account()
    with pytest.raises(ConfigError, match=rf"^no kubeconfig at {places.variable}, {places.named}$"):
        places.found(environ=IN_POD | {"KUBECONFIG": f"{places.variable}{os.pathsep}{places.named}"})


def test_a_context_that_is_not_there(places: Places) -> None:
    file = write(places.named, "named", current="c")
    with pytest.raises(ConfigError, match=rf"^{file}: no context 'c'; its contexts are a, b$"):
        places.found(file)
    with pytest.raises(ConfigError, match=rf"^{file}: no context 'd'; its contexts are a, b$"):
        places.found(file, context="d")
    assert places.found(file, context="a")[0] == "http://named:1"
    without = write(places.named, "named", current="")
    with pytest.raises(ConfigError, match=rf"^{file}: no current-context; say --context, of which there are a, b$"):
        places.found(without)
    assert places.found(without, context="a")[0] == "http://named:1"
    places.mount_account()
    with pytest.raises(ConfigError, match="this pod has its ServiceAccount alone"):
        places.found(context="a")


CONTEXT = "contexts: [{name: a, context: {cluster: c, user: u}}]\ncurrent-context: a\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("# nothing yet\n", "is empty"),
        ("hello", BEGINS),
        ("[1, 2]", BEGINS),
        ("contexts: [\n{name: a]", ":2:9: not YAML: expected ',' or '}', but got ']'"),
        ("contexts: []", "no current-context; say --context, of which there are none"),
        ("contexts: [{context: {}}]", "'name' is missing"),
        ("contexts: a", "string indices must be integers, not 'str'"),
        (CONTEXT, "Invalid kube-config file. Expected object with name c in {file}/clusters list"),
        (f"{CONTEXT}clusters: [{{name: c, cluster: {{}}}}]", "cluster c has no server"),
        (
            f"{CONTEXT}clusters: [{{name: c, cluster: {{server: 'https://c', certificate-authority: /none/ca}}}}]",
            "File does not exist: /none/ca",
        ),
    ],
    ids=lambda part: part.replace("\n", " ")[:40] or "nothing",
)
def test_one_that_cannot_be_used(places: Places, content: str, said: str) -> None:
    """One line that names the file."""
    places.named.write_text(content)
    with pytest.raises(ConfigError) as caught:
        places.found(places.named)
    said = said.format(file=places.named) if "{file}" in said else said
    assert str(caught.value) == f"{places.named}{said if said.startswith(':') else f': {said}'}"


def test_what_is_no_text_file(places: Places) -> None:
    places.named.mkdir()
    with pytest.raises(ConfigError, match=rf"^{places.named}: is a directory$"):
        places.found(places.named)
    places.variable.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=rf"^{places.variable}: 'utf-8' codec can't decode byte"):
        places.found(places.variable)


def test_an_account_that_is_not_complete(places: Places) -> None:
    places.mount_account()
    (places.account / "namespace").unlink()
    assert places.found()[1] == "default"
    (places.account / "ca.crt").unlink()
    with pytest.raises(ConfigError, match=rf"^{places.account}: Service certif\w+ file does not exist"):
        places.found()
