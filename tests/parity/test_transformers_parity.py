"""The transformers engine with remote experts against the local model, family by family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mesh import running_directory, running_dispatcher, running_groups
from tiny_models import FAMILIES, VOCABULARY, make_checkpoint
from transformers import AutoModelForCausalLM

from expertmesh.artifact.prepare import prepare
from router_service.engines.transformers_engine import load_trunk

TOLERANCE = 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_the_local_model(family: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(family, tmp_path / "checkpoint")
    artifact = tmp_path / "artifact"
    prepare(checkpoint, artifact)
    tokens = torch.randint(6, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(1))
    local = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()(tokens).logits

    with (
        running_directory() as directory,
        running_groups(artifact, directory, 2) as replicas,
        running_dispatcher(artifact, directory) as dispatcher,
    ):
        trunk = load_trunk(artifact, dispatcher)
        remote = trunk(tokens).logits
        rows = [sum(map(sum, replica.expert_rows().values())) for replica in replicas]

    assert all(rows), "every group computed rows"
    assert local.std() > 0.1, "logits that are all alike would show nothing"
    torch.testing.assert_close(remote, local, atol=TOLERANCE, rtol=0)


def test_the_trunk_holds_no_expert(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("mixtral", tmp_path / "checkpoint")
    prepare(checkpoint, tmp_path / "artifact")
    with running_directory() as directory, running_dispatcher(tmp_path / "artifact", directory) as dispatcher:
        trunk = load_trunk(tmp_path / "artifact", dispatcher)
    assert not [name for name, _ in trunk.named_parameters() if ".experts." in name]
