"""How docs/kubernetes.md gets a model there: the pod fits the example, and its commands leave what `prepare` takes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart_schemas import VERSIONS, check
from test_example_sizes import MODEL_POD
from test_guide import GUIDE, commands
from test_serve_config import merged
from tiny_models import make_checkpoint

from expertmesh.artifact.prepare import prepare
from expertmesh.errors import ArtifactError
from tools.chart.helm import CHART, objects, template

EXAMPLE = CHART / "examples" / "deepseek-v3-32-gpus.yaml"
IN_POD = "kubectl -n expertmesh exec model -- "


@pytest.fixture
def claim_and_pod() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(MODEL_POD.read_text()))


@pytest.mark.parametrize("version", VERSIONS)
def test_it_keeps_to_the_schemas(version: str, claim_and_pod: list[dict[str, Any]]) -> None:
    assert len(claim_and_pod) == 2
    check(claim_and_pod, version)


def test_the_pod_fits_the_example(claim_and_pod: list[dict[str, Any]]) -> None:
    """Claim, mount, image, GPUs; and the restricted standard, to which the guide's namespace holds its pods."""
    claim, pod = claim_and_pod
    values = merged(EXAMPLE)
    (container,) = pod["spec"]["containers"]
    (volume,) = pod["spec"]["volumes"]
    assert {claim["metadata"]["name"], volume["persistentVolumeClaim"]["claimName"]} == {
        values["model"]["existingClaim"]
    }
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == [values["model"]["mountPath"]]
    assert f"mv {values['model']['prepare']['source']}.part {values['model']['prepare']['source']}\n" in GUIDE
    rendered = objects(template(EXAMPLE))
    (job,) = (one["spec"]["template"]["spec"] for one in rendered if one["kind"] == "Job")
    assert container["image"] == job["containers"][0]["image"]
    (pool,) = values["expertPools"]
    assert (pod["spec"]["nodeSelector"], pod["spec"]["tolerations"]) == (pool["nodeSelector"], pool["tolerations"])
    theirs = job["containers"][0]["securityContext"]
    assert container["securityContext"] == {key: theirs[key] for key in ("allowPrivilegeEscalation", "capabilities")}
    for key in ("runAsNonRoot", "runAsUser", "fsGroup", "seccompProfile"):
        assert pod["spec"]["securityContext"][key] == job["securityContext"][key], key


def test_what_the_conversion_leaves_is_prepared(tmp_path: Path) -> None:
    """The script writes shards and their index; the guide's lines after it bring the rest."""
    volume = tmp_path / "models"
    published, converted = volume / "DeepSeek-V3", volume / "DeepSeek-V3-bf16"
    make_checkpoint("deepseek_v3", published, sharded=True)
    (published / "generation_config.json").touch()
    config = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ArtifactError, match="quantization_config says fp8") as caught:
        prepare(published, volume / "artifact")
    assert f"`{str(caught.value).partition(': ')[2]}`" in GUIDE.replace("\n", " ")

    lines = list(commands())
    start = next(place for place, line in enumerate(lines) if "fp8_cast_bf16.py" in line) + 1
    stop = next(place for place, line in enumerate(lines) if line == "kubectl -n expertmesh delete pod model")
    part = converted.with_name(f"{converted.name}.part")
    part.mkdir()
    for weights in [*published.glob("*.safetensors"), published / "model.safetensors.index.json"]:
        shutil.copy(weights, part)
    for line in lines[start:stop]:
        here = line.replace(IN_POD, "").replace("kubectl -n expertmesh cp", "cp").replace("model:/", "/")
        here = here.replace("/models/", f"{volume}/")
        assert "kubectl" not in here
        subprocess.run(["bash", "-ec", here], cwd=tmp_path, check=True, timeout=60)
    assert not part.exists()
    assert prepare(converted, volume / "artifact").architecture == "DeepseekV3ForCausalLM"
