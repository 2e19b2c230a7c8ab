"""Real PEFT folders on a BERT of 16 × 1, small enough to be made for a test."""

import json

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from bilora.tasks import load_tokenizer

DATA = ["--validation-examples", "12", "--train-examples", "12", "--max-length", "16", "--batch-size", "4"]


def save_model(place):
    """The base model with MiniLM's tokenizer; returned as well."""
    tokenizer = load_tokenizer("minilm")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), initializer_range=0.3, **size))
    base.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return base


def save_adapter(place, model, seed, rank=2, record=None):
    """A random adapter on the base in ``model``; with ``record``, (method, training seed), as if trained here."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    get_peft_model(BertForSequenceClassification.from_pretrained(model), config).save_pretrained(place)
    if record is not None:
        method, training_seed = record
        (place / "train.json").write_text(json.dumps({"spec": {"method": method, "seed": training_seed}}))
