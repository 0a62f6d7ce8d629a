"""The model that `serve` measures: a random Mixtral of 111 M parameters, its tokenizer and its artifact."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from expertmesh.artifact.prepare import prepare

VOCABULARY = 4096
EXPERTS = 8
MAX_LEN = 1024
SEED = 0
END = "</s>"


def make(work: Path) -> tuple[Path, Path]:
    """The checkpoint and its artifact under `work`, made where they are not there yet."""
    checkpoint, artifact = work / "checkpoint", work / "artifact"
    if not (checkpoint / "tokenizer.json").exists():
        shutil.rmtree(checkpoint, ignore_errors=True)
        save_checkpoint(checkpoint)
    if not (artifact / "manifest.json").exists():
        prepare(checkpoint, artifact)
    return checkpoint, artifact


def save_checkpoint(directory: Path) -> None:
    """bf16 weights from a fixed seed: hidden 512, intermediate 1024, 8 layers, 8 experts, top-2, vocabulary 4096."""
    torch.manual_seed(SEED)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=MAX_LEN,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.05,
        tie_word_embeddings=False,
    )
    model = MixtralForCausalLM(config).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(directory)
    words = {word: index for index, word in enumerate(["<s>", END, "<pad>", *(f"w{i}" for i in range(3, VOCABULARY))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=END, pad_token="<pad>", model_max_length=MAX_LEN
    ).save_pretrained(directory)
