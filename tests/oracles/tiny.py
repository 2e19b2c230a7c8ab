"""Tiny models of real architecture, ragged data, and their exact derivatives from plain tensors. No project code."""

from itertools import pairwise
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

LENGTHS = (3, 9, 5, 7, 4, 6, 8, 2, 5, 9, 6, 3, 7, 4, 8, 5, 6, 9, 2, 7, 4)
SIZES = (6, 6, 6, 3)
SCALE = 2.0


def generator(seed):
    return torch.Generator().manual_seed(seed)


def bert(dtype=torch.float64, seed=0, hidden=8):
    """BERT with LayerNorm and GELU; wide initial weights, so that its curvature is not almost zero."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=40,
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
        initializer_range=0.4,
        num_labels=3,
    )
    return BertForSequenceClassification(config).to(dtype)


def llama(dtype=torch.float32, tied=True):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=32,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype)


def gpt2(dtype=torch.float64):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2, n_positions=16, initializer_range=0.3)
    return GPT2LMHeadModel(config).to(dtype)


def with_lora(model, task="SEQ_CLS", seed=1, **config):
    """A LoRA adapter whose B is not zero, as after training."""
    arguments = {"r": 2, "lora_alpha": 2 * SCALE, "target_modules": "all-linear", "lora_dropout": 0.1, **config}
    adapted = get_peft_model(model, LoraConfig(task_type=task, **arguments))
    stream = generator(seed)
    with torch.no_grad():
        for name, parameter in sorted(adapted.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=stream, dtype=torch.float64))
    return adapted


def examples(lengths=LENGTHS, vocabulary=40, labels=3, seed=2):
    """(token ids, label) of each example."""
    stream = generator(seed)
    return [
        (torch.randint(1, vocabulary, (n,), generator=stream), int(torch.randint(labels, (1,), generator=stream)))
        for n in lengths
    ]


def padded(chosen):
    """A classification batch, padded on the right."""
    width = max(len(ids) for ids, _ in chosen)
    return {
        "input_ids": torch.stack([F.pad(ids, (0, width - len(ids))) for ids, _ in chosen]),
        "attention_mask": torch.stack([(torch.arange(width) < len(ids)).long() for ids, _ in chosen]),
        "labels": torch.tensor([label for _, label in chosen]),
    }


def language_batch(chosen):
    """A language modelling batch, padded on the right, padding not predicted."""
    batch = padded(chosen)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def split(items, sizes=SIZES):
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [items[start:end] for start, end in pairwise(bounds)]


def factors_of(adapted):
    """(layer, A, B) of each adapted layer, read from PEFT's parameter names."""
    found = dict(adapted.named_parameters())
    prefix, suffix = "base_model.model.", ".lora_A.default.weight"
    return [
        (name.removeprefix(prefix).removesuffix(suffix), A.detach(), found[name.replace("lora_A", "lora_B")].detach())
        for name, A in found.items()
        if name.endswith(suffix)
    ]


class ClassifierOracle:
    """Mean loss of a base BERT over all examples in one padded batch, as a function of one flat vector.

    ``full``: the merged weights of the adapted layers, one after the other. ``lora``: A then B of each layer.
    """

    def __init__(self, base, factors, chosen, space):
        base.config._attn_implementation = "eager"
        self.base, self.space = base.eval(), space
        self.batch = padded(chosen)
        self.labels = self.batch.pop("labels")
        self.layers = [(name, base.get_parameter(f"{name}.weight").detach(), A, B) for name, A, B in factors]
        full = [W + SCALE * B @ A for _, W, A, B in self.layers]
        lora = [tensor for _, _, A, B in self.layers for tensor in (A, B)]
        self.parts = full if space == "full" else lora
        self.point = torch.cat([tensor.flatten() for tensor in self.parts])

    def loss(self, flat):
        pieces = [p.view_as(t) for p, t in zip(flat.split([t.numel() for t in self.parts]), self.parts, strict=True)]
        if self.space == "lora":
            pairs = zip(pieces[::2], pieces[1::2], strict=True)
            pieces = [W + SCALE * B @ A for (_, W, _, _), (A, B) in zip(self.layers, pairs, strict=True)]
        weights = {f"{name}.weight": piece for (name, _, _, _), piece in zip(self.layers, pieces, strict=True)}
        logits = torch.func.functional_call(self.base, weights, kwargs=self.batch).logits
        return F.cross_entropy(logits, self.labels)

    def gradient_by_differences(self, direction, step=1e-5):
        """Directional derivative by central differences of fourth order."""
        with torch.no_grad():
            at = {m: float(self.loss(self.point + m * step * direction)) for m in (-2, -1, 1, 2)}
        return (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)

    def hessian(self, chunk=64):
        """(n, n), row by row: the gradient differentiated along each axis."""
        point = self.point.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.loss(point), point, create_graph=True)
        axes = torch.eye(len(point), dtype=point.dtype).split(chunk)
        rows = [
            torch.autograd.grad(gradient, point, axis, retain_graph=True, is_grads_batched=True)[0] for axis in axes
        ]
        return torch.cat(rows)


class Quadratic(nn.Module):
    """``L = ½·thetaᵀ·Q·diag(spectrum)·Qᵀ·theta − bᵀ·theta`` of a weight (rows, columns), Q random orthogonal."""

    def __init__(self, spectrum, slope=None, rows=1, dtype=torch.float64):
        super().__init__()
        values = torch.tensor(spectrum, dtype=torch.float64)
        size = len(values)
        Q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator(5), dtype=torch.float64))
        slope = torch.ones(size, dtype=torch.float64) if slope is None else slope
        self.register_buffer("H", ((Q * values) @ Q.T).to(dtype))
        self.register_buffer("b", (Q @ slope).to(dtype))
        self.register_buffer("Q", Q)
        self.theta = nn.Parameter(torch.zeros(rows, size // rows, dtype=dtype))

    def forward(self, x):
        theta = self.theta.flatten()
        return SimpleNamespace(loss=0.5 * theta @ self.H @ theta - self.b @ theta + 0.0 * x.sum())
