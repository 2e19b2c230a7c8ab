"""Tiny models of real architecture and ragged data for the training tests."""

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

LENGTHS = (3, 9, 5, 7, 4, 6, 8, 2)


def tiny_bert(dropout=0.0, dtype=torch.float64):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=3,
    )
    return BertForSequenceClassification(config).to(dtype)


def tiny_llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype)


def with_lora(model, task_type="SEQ_CLS", dropout=0.0, rank=2):
    torch.manual_seed(1)
    config = LoraConfig(task_type=task_type, r=rank, lora_alpha=4, lora_dropout=dropout, target_modules="all-linear")
    # PEFT creates factors in float32 whatever the base model's type.
    return get_peft_model(model, config, autocast_adapter_dtype=False).to(model.dtype)


def ragged_data(copies=1, causal=False):
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(1, 40, (n,), generator=generator).tolist() for n in LENGTHS * copies]
    labels = ids if causal else [len(row) % 3 for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def pad(examples):
    """Right-pad to the longest; labels of a language model get −100 where there is no token."""
    width = max(len(e["input_ids"]) for e in examples)
    ids = torch.tensor([e["input_ids"] + [0] * (width - len(e["input_ids"])) for e in examples])
    mask = torch.tensor([[1] * len(e["input_ids"]) + [0] * (width - len(e["input_ids"])) for e in examples])
    if isinstance(examples[0]["labels"], list):
        labels = torch.tensor([e["labels"] + [-100] * (width - len(e["labels"])) for e in examples])
    else:
        labels = torch.tensor([e["labels"] for e in examples])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def factors(model):
    """Trained tensors of a PEFT model by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
