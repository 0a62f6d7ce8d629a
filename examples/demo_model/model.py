"""The demo model's architecture and its tokenizer."""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from examples.demo_model.chat import END, ROLES, TEMPLATE

VOCABULARY = 4096
POSITIONS = 1024


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of VOCABULARY tokens, which reads digits one by one and knows the chat template."""
    tokenizer = Tokenizer(models.BPE())
    digits, spaces = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, spaces])
    tokenizer.decoder = decoders.ByteLevel()
    special = [END, *(f"<|{role}|>" for role in ROLES)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=special[1:],
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    return fast


def configuration(end: int) -> Qwen3MoeConfig:
    """Four layers of 16 experts, two per token, in Qwen3-MoE's architecture. `end` is the end-of-text token's id."""
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=160,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=POSITIONS,
        initializer_range=0.04,
        eos_token_id=end,
        pad_token_id=end,
        dtype="bfloat16",
    )


def new_model(end: int, seed: int) -> Qwen3MoeForCausalLM:
    """A model in bfloat16 with random weights; its experts run as one grouped matmul."""
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(configuration(end))
    model.set_experts_implementation("grouped_mm")
    return model.to(torch.bfloat16)
