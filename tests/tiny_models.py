"""Tiny random mixture-of-experts checkpoints, one per family, in the layout that the family has on disk.

Small enough for a test, and of shapes that vLLM's CPU kernels take: head sizes 32 to 128, and MLA's rank 512 + rope 64.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 512
EXPERTS = 8
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>"]

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 96,
        "num_local_experts": EXPERTS,
    },
    "qwen2_moe": {
        "num_hidden_layers": 4,
        "intermediate_size": 160,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 64,
        "num_experts": EXPERTS,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {
        "num_hidden_layers": 3,
        "head_dim": 32,
        "intermediate_size": 160,
        "moe_intermediate_size": 48,
        "num_experts": EXPERTS,
        "norm_topk_prob": True,
    },
    "olmoe": {"num_hidden_layers": 2, "intermediate_size": 48, "num_experts": EXPERTS},
    "deepseek_v3": {
        "num_hidden_layers": 3,
        "intermediate_size": 128,
        "moe_intermediate_size": 48,
        "n_shared_experts": 1,
        "n_routed_experts": EXPERTS,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
        "q_lora_rank": 48,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
    },
    "gpt_oss": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 32,
        "intermediate_size": 64,
        "num_local_experts": EXPERTS,
        "sliding_window": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 128,
        },
    },
}
FAMILIES = tuple(_FAMILIES)


def make_checkpoint(
    family: str,
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    sharded: bool = False,
    **overrides: Any,
) -> Path:
    """Saves a random model of `family` (one of FAMILIES) with a tokenizer under `directory`, which it returns.

    The same seed gives the same weights, sharded or not. `overrides` go into the model's config.
    """
    config = AutoConfig.for_model(family, **{**_COMMON, **_FAMILIES[family], **overrides})
    save_checkpoint(config, directory, dtype=dtype, seed=seed, sharded=sharded)
    return directory


def save_checkpoint(
    config: PreTrainedConfig, directory: Path, *, dtype: torch.dtype, seed: int, sharded: bool = False
) -> None:
    """Saves a random model of `config`, with a tokenizer."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model, seed)
    model = model.to(dtype)
    model.config.dtype = dtype
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(directory, max_shard_size=size // 5 if sharded else size * 2)
    _tokenizer().save_pretrained(directory)


@torch.no_grad()
def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Weights that keep activations near unit scale and leave nothing zero, one or the same for every expert."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        noise = torch.randn(tensor.shape, generator=generator)
        leaf = name.rpartition(".")[2]
        if "inv_freq" in leaf:
            continue
        if leaf == "e_score_correction_bias" or "bias" in leaf:
            tensor.copy_(noise * 0.1)
        elif leaf == "sinks":
            tensor.copy_(noise)
        elif "norm" in name:
            tensor.copy_(1 + noise * 0.1)
        elif "embed_tokens" in name:
            tensor.copy_(noise)
        else:
            tensor.copy_(noise * _scale(model, name, tensor))


def _scale(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> float:
    owner = model.get_submodule(name.rpartition(".")[0])
    fan_in = tensor.shape[-2] if getattr(owner, "is_transposed", False) else tensor.shape[-1]
    gain = 2.0 if name.endswith(("gate.weight", "router.weight", "lm_head.weight")) else 1.0
    if hasattr(owner, "limit"):  # clamps of some rows, and output of unit scale
        gain = 0.1 if "down" in name else 4.0
    return gain / math.sqrt(fan_in)


@functools.cache
def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, its merges learnt from a module of the standard library."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(inspect.getsource(argparse).splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )
