"""Checkpoints of all families become artifacts whose experts and trunk are the model's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import EXPERTS, FAMILIES, make_checkpoint, save_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, conversion_mapping

from expertmesh.artifact.experts import load_experts
from expertmesh.artifact.function import expert_forward
from expertmesh.artifact.manifest import ExpertFunction, experts_file, read_manifest
from expertmesh.artifact.prepare import prepare
from expertmesh.errors import ArtifactError

MOE_LAYERS = {
    "mixtral": [0, 1],
    "qwen2_moe": [0, 2, 3],
    "qwen3_moe": [0, 1, 2],
    "olmoe": [0, 1],
    "deepseek_v3": [1, 2],
    "gpt_oss": [0, 1],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_compute_what_the_loaded_model_computes(family: str, tmp_path: Path) -> None:
    source = make_checkpoint(family, tmp_path / family)
    manifest = prepare(source, tmp_path / "artifact")
    assert manifest == read_manifest(tmp_path / "artifact")
    assert manifest.layers == dict.fromkeys(MOE_LAYERS[family], EXPERTS)
    assert (manifest.name, manifest.model_type, manifest.top_k, manifest.dtype) == (family, family, 2, "float32")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, experts_implementation="eager")
    x = torch.randn(5, manifest.hidden_size, generator=torch.Generator().manual_seed(7)) * 3
    for layer in manifest.layers:
        module = model.model.layers[layer].mlp.experts
        for index, weights in load_experts(tmp_path / "artifact", manifest, layer, range(EXPERTS)).items():
            with torch.no_grad():
                wanted = module(x, torch.full((5, 1), index), torch.ones(5, 1))
            torch.testing.assert_close(
                expert_forward(x, weights, manifest.expert_function), wanted, atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_trunk_holds_the_source_tensors_but_the_experts(family: str, tmp_path: Path) -> None:
    source = make_checkpoint(family, tmp_path / family)
    manifest = prepare(source, tmp_path / "artifact")
    trunk, whole = load_file(tmp_path / "artifact/trunk/model.safetensors"), load_file(source / "model.safetensors")
    assert set(trunk) == {name for name in whole if ".experts." not in name}
    assert all(torch.equal(trunk[name], whole[name]) for name in trunk)
    experts = sum(tensor.nbytes for name, tensor in whole.items() if name not in trunk)
    assert sum(manifest.layers.values()) * manifest.expert_bytes == experts
    config = json.loads((tmp_path / "artifact/trunk/config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "expertmesh",
        "format_version": 1,
        "fingerprint": manifest.fingerprint,
    }
    assert config == json.loads((source / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "artifact/trunk" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_keep_the_type_of_the_checkpoint(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    manifest = prepare(make_checkpoint(family, tmp_path / "source", dtype=dtype), tmp_path / "artifact")
    assert manifest.torch_dtype == dtype
    weights = load_experts(tmp_path / "artifact", manifest, 0, [3])[3]
    assert weights.down.dtype == dtype
    assert sum(tensor.nbytes for tensor in weights.tensors().values()) == manifest.expert_bytes


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu"])
def test_activation_is_found_by_what_it_computes(activation: str, tmp_path: Path) -> None:
    source = make_checkpoint("mixtral", tmp_path / "source", hidden_act=activation)
    assert prepare(source, tmp_path / "artifact").expert_function.activation == activation


def test_clamps_and_biases_are_in_the_function(tmp_path: Path) -> None:
    source = make_checkpoint("gpt_oss", tmp_path / "source", swiglu_limit=3.0, swiglu_alpha=1.5)
    function = prepare(source, tmp_path / "artifact").expert_function
    assert (function.activation, function.alpha, function.limit) == ("swiglu_clamped", 1.5, 3.0)
    assert function.gated and function.bias


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_sharded_and_whole_checkpoints_make_the_same_artifact(family: str, tmp_path: Path) -> None:
    whole = prepare(make_checkpoint(family, tmp_path / "whole"), tmp_path / "a")
    sharded = prepare(make_checkpoint(family, tmp_path / "sharded", sharded=True), tmp_path / "b")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    assert whole.model_copy(update={"name": "sharded"}) == sharded
    for path in (tmp_path / "a").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_other_weights_have_another_fingerprint(tmp_path: Path) -> None:
    prints = {
        prepare(make_checkpoint("olmoe", tmp_path / f"s{i}", seed=i), tmp_path / f"a{i}").fingerprint for i in (0, 1)
    }
    assert len(prints) == 2


def test_experts_are_mapped_in_place(tmp_path: Path) -> None:
    manifest = prepare(make_checkpoint("mixtral", tmp_path / "source"), tmp_path / "artifact")
    weights = load_experts(tmp_path / "artifact", manifest, 1, [2])[2]
    path = str(experts_file(tmp_path / "artifact", 1))
    spans = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if path in line]
    assert any(int(low, 16) <= weights.down.data_ptr() < int(high, 16) for low, high in spans)


def test_a_trunk_that_passes_the_shard_size_is_split_and_indexed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertmesh.artifact.plan.TRUNK_SHARD_BYTES", 100_000)
    source = make_checkpoint("olmoe", tmp_path / "source")
    prepare(source, tmp_path / "artifact")
    index = json.loads((tmp_path / "artifact/trunk/model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in (tmp_path / "artifact/trunk").glob("*.safetensors")}
    assert len(shards) > 2 and set(index["weight_map"].values()) == set(shards)
    assert all(name in shards[shard] for name, shard in index["weight_map"].items())
    assert sum(map(len, shards.values())) == len(index["weight_map"])


def test_what_an_artifact_lacks_is_named(tmp_path: Path) -> None:
    manifest = prepare(make_checkpoint("mixtral", tmp_path / "source"), tmp_path / "artifact")
    with pytest.raises(ArtifactError, match=r"layer 7 has no experts; MoE layers: \[0, 1\]"):
        load_experts(tmp_path / "artifact", manifest, 7, [0])
    with pytest.raises(ArtifactError, match=r"layer-00001.safetensors: expert 8 has no tensor 8.gate_up"):
        load_experts(tmp_path / "artifact", manifest, 1, [0, 8])
    wider = manifest.model_copy(update={"intermediate_size": 7})
    with pytest.raises(ArtifactError, match=r"layer-00001.safetensors: expert 0: 0.gate_up is .*, not"):
        load_experts(tmp_path / "artifact", wider, 1, [0])
    experts_file(tmp_path / "artifact", 1).unlink()
    with pytest.raises(ArtifactError, match=r"layer-00001.safetensors"):
        load_experts(tmp_path / "artifact", manifest, 1, [0])


def test_layouts_that_are_converted_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused and transposed, as some families store their experts: here olmoe read by qwen3_vl_moe's rules."""
    plain = make_checkpoint("olmoe", tmp_path / "plain")
    wanted = prepare(plain, tmp_path / "wanted")
    state = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).state_dict()
    fused = {name: (tensor.mT if ".experts." in name else tensor).contiguous() for name, tensor in state.items()}
    source = make_checkpoint("olmoe", tmp_path / "source")
    save_file(fused, source / "model.safetensors")
    monkeypatch.setattr("expertmesh.artifact.prepare.STEP_BYTES", 3 * wanted.expert_bytes)
    rules = conversion_mapping.get_checkpoint_conversion_mapping("qwen3_vl_moe")
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "olmoe", rules)
    assert prepare(source, tmp_path / "artifact").layers == wanted.layers
    for path in (tmp_path / "wanted").rglob("layer-*.safetensors"):
        assert path.read_bytes() == (tmp_path / "artifact/experts" / path.name).read_bytes()


def test_experts_without_a_gate(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "nemotron_h",
        vocab_size=512,
        hidden_size=64,
        layers_block_type=["attention", "moe", "attention", "moe"],
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        n_routed_experts=EXPERTS,
        moe_intermediate_size=48,
        moe_shared_expert_intermediate_size=48,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
    )
    save_checkpoint(config, tmp_path / "source", dtype=torch.float32, seed=0)
    manifest = prepare(tmp_path / "source", tmp_path / "artifact")
    assert manifest.expert_function == ExpertFunction(activation="relu2", gated=False)
    assert manifest.layers == {1: EXPERTS, 3: EXPERTS}
    assert load_experts(tmp_path / "artifact", manifest, 1, [0])[0].gate_up.shape == (48, 64)
