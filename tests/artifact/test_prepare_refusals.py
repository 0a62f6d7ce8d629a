"""Bad sources: one line that names the thing, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_checkpoint
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from expertmesh.artifact.prepare import prepare
from expertmesh.errors import ArtifactError

EXPERT = "model.layers.1.block_sparse_moe.experts.5"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint("mixtral", tmp_path / "source")


def refusal(source: Path) -> str:
    """The message, whose one line names the source; nothing is at the destination."""
    artifact = source.parent / "artifact"
    with pytest.raises(ArtifactError) as caught:
        prepare(source, artifact)
    assert not artifact.exists()
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(source))
    return message.removeprefix(str(source))


def edit_config(source: Path, **changes: object) -> None:
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(source: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})


def test_no_source(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere") == ": no such directory"


def test_a_dense_model(tmp_path: Path) -> None:
    source = make_checkpoint("qwen2_moe", tmp_path / "source", mlp_only_layers=[0, 1, 2, 3])
    assert refusal(source) == ": Qwen2MoeForCausalLM is no mixture of experts that transformers can dispatch"


def test_missing_config(source: Path) -> None:
    (source / "config.json").unlink()
    assert refusal(source) == "/config.json: missing"


def test_malformed_config(source: Path) -> None:
    (source / "config.json").write_text("{")
    assert refusal(source).startswith("/config.json: not JSON")


def test_impossible_config(source: Path) -> None:
    edit_config(source, num_hidden_layers="many")
    assert refusal(source).startswith("/config.json: MixtralForCausalLM can't be built from it: ")


def test_unknown_architecture(source: Path) -> None:
    edit_config(source, architectures=["UnheardOfForCausalLM"])
    assert refusal(source).endswith("has no UnheardOfForCausalLM")


def test_code_in_the_checkpoint_is_not_run(source: Path) -> None:
    (source / "evil.py").write_text("raise SystemExit('ran')")
    edit_config(source, model_type="evil", architectures=["Evil"], auto_map={"AutoConfig": "evil.Config"})
    assert refusal(source).endswith("has no Evil")


def test_quantised_weights(source: Path) -> None:
    edit_config(source, quantization_config={"quant_method": "mxfp4"})
    assert (
        refusal(source) == "/config.json: quantization_config says mxfp4: quantised checkpoints are not supported yet"
    )


def test_no_weights(source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    assert refusal(source) == (
        ": neither model.safetensors nor model.safetensors.index.json; "
        "pytorch_model.bin is a pickle, which is never opened"
    )


def test_missing_shard(tmp_path: Path) -> None:
    source = make_checkpoint("mixtral", tmp_path / "source", sharded=True)
    shard = sorted(source.glob("*.safetensors"))[2]
    shard.unlink()
    assert refusal(source) == f"/{shard.name}: missing, though model.safetensors.index.json names it"


def test_index_that_leads_elsewhere(tmp_path: Path) -> None:
    source = make_checkpoint("mixtral", tmp_path / "source", sharded=True)
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../other.safetensors"}}))
    assert refusal(source).endswith("../other.safetensors is not the name of a file beside it")


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_weights(keep: int, source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert refusal(source).startswith("/model.safetensors: truncated")


def test_corrupt_header(source: Path) -> None:
    path = source / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(data)
    assert refusal(source).startswith("/model.safetensors: corrupt header")


def test_numbers_that_are_none(source: Path) -> None:
    edit_weights(source, lambda weights: weights[f"{EXPERT}.w2.weight"].view(-1)[3].fill_(float("nan")))
    assert refusal(source) == ": layer 1: expert 5: its weights are not all finite numbers"


@pytest.mark.parametrize("matrix", ["w1", "w2", "w3"])
def test_an_expert_that_lacks_a_tensor(matrix: str, source: Path) -> None:
    edit_weights(source, lambda weights: weights.pop(f"{EXPERT}.{matrix}.weight"))
    assert refusal(source) == f": layer 1: expert 5 of 8: no tensor .experts.5.{matrix}.weight"


def test_more_experts_than_the_config_says(source: Path) -> None:
    edit_config(source, num_local_experts=6)
    assert "expert 6 of 6: one more than the config has" in refusal(source)


def test_an_expert_of_another_shape(source: Path) -> None:
    edit_weights(source, lambda weights: weights.update({f"{EXPERT}.w2.weight": torch.ones(64, 95)}))
    assert ": layer 1: down_proj: the checkpoint's tensors don't fit together" in refusal(source)


def test_experts_of_another_size_than_the_config_says(source: Path) -> None:
    edit_config(source, intermediate_size=100)
    assert (
        refusal(source) == ": layer 0: gate_up_proj: the checkpoint's tensors make shape [8, 192, 64], not [8, 200, 64]"
    )


def test_experts_of_several_types(source: Path) -> None:
    edit_weights(
        source, lambda weights: weights.update({f"{EXPERT}.w2.weight": torch.ones(64, 96, dtype=torch.bfloat16)})
    )
    assert refusal(source) == ": experts of several types: BF16, F32"


def test_experts_in_eight_bits(source: Path) -> None:
    eight = torch.float8_e4m3fn
    edit_weights(
        source, lambda weights: weights.update({k: v.to(eight) for k, v in weights.items() if ".experts." in k})
    )
    assert "experts of type F8_E4M3 are not supported yet" in refusal(source).replace(str(source), "")


def test_a_layer_without_experts(tmp_path: Path) -> None:
    source = make_checkpoint("gpt_oss", tmp_path / "source")
    edit_weights(source, lambda weights: weights.pop("model.layers.1.mlp.experts.down_proj_bias"))
    assert refusal(source) == ": no tensor for GptOssForCausalLM's model.layers.1.mlp.experts.down_proj_bias"


def test_a_trunk_that_lacks_a_tensor(source: Path) -> None:
    edit_weights(
        source, lambda weights: [weights.pop(f"model.layers.{i}.block_sparse_moe.gate.weight") for i in (0, 1)]
    )
    assert refusal(source) == ": no tensor for MixtralForCausalLM's model.layers.0.mlp.gate.weight and 1 more"


def test_tied_embeddings_are_not_missed(tmp_path: Path) -> None:
    source = make_checkpoint("mixtral", tmp_path / "source", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(source / "model.safetensors")
    prepare(source, tmp_path / "artifact")


def test_layers_that_the_model_does_not_have_are_left_out(source: Path) -> None:
    """As multi-token prediction's, whose experts no engine of ours loads."""
    edit_config(source, num_hidden_layers=1)
    manifest = prepare(source, source.parent / "artifact")
    trunk = load_file(source.parent / "artifact/trunk/model.safetensors")
    assert manifest.layers == {0: 8} and not any(".experts." in name for name in trunk)


def test_an_activation_that_no_artifact_can_name(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def apply_gate(module: MixtralExperts, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return module.act_fn(gate.clamp(max=10)) * up

    monkeypatch.setattr(MixtralExperts, "_apply_gate", apply_gate)
    message = refusal(source)
    assert message.startswith(": MixtralExperts: this expert function can't be reproduced: silu is off by 1.")
    assert message.endswith("of a row's size, more than 5e-05")


def test_experts_that_weigh_their_input(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = MixtralExperts.forward

    def forward(self: MixtralExperts, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return inner(self, x * weights, index, torch.ones_like(weights))

    monkeypatch.setattr(MixtralExperts, "forward", forward)
    assert "layer 0: expert 0: MixtralExperts: this expert function can't be reproduced" in refusal(source)


def test_no_source_file_is_opened_as_a_pickle_or_copied_as_code(source: Path) -> None:
    for name in ("modeling.py", "pytorch_model.bin", "training_args.bin", "optimizer.pt", ".hidden.json"):
        (source / name).write_bytes(b"\x80\x04.")
    (source / "LICENSE").write_text("free")
    prepare(source, source.parent / "artifact")
    names = {path.name for path in (source.parent / "artifact/trunk").iterdir()}
    assert names == {
        path.name for path in source.iterdir() if path.suffix in (".json", ".jinja", ".safetensors", "")
    } - {".hidden.json"}
