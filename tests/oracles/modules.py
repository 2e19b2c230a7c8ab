"""Small modules of known curvature, and a Llama whose whole Hessian fits on a page. No project code."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from tests.oracles import tiny

TOKENS = 12
UNEVEN = (2, 3, 6)


def small_llama(dtype=torch.float64, tied=True):
    """One layer, 12 tokens: a few hundred parameters in all.

    Its norms are torch's, since those of transformers round float64 to float32 on the way.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=8,
        max_position_embeddings=32,
        initializer_range=0.5,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    for name in [name for name, _ in model.named_modules()]:
        if name.endswith("norm"):
            model.set_submodule(name, nn.RMSNorm(config.hidden_size, config.rms_norm_eps))
    return unrounded(model.to(dtype))


def unrounded(model):
    """``model`` with the mean cross entropy of the next token in its own precision: transformers' is in float32."""

    def loss(logits, labels, **_):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    model.loss_function = loss
    return model


def uneven_examples():
    """Split by ``UNEVEN``, their batches predict 13, 24 and 52 tokens."""
    return tiny.examples((10, 5, 12, 4, 11, 15, 8, 14, 3, 16, 2), vocabulary=TOKENS, seed=7)


def masked_bert(dtype=torch.float64):
    """One layer of BERT with LayerNorm and GELU that predicts 12 tokens by its own embeddings: 900 parameters."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=TOKENS,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        initializer_range=0.4,
        tie_word_embeddings=True,
    )
    return BertForMaskedLM(config).to(dtype)


def masked_batch(chosen):
    """Padded on the right; every third token is to be found, its place filled by token 1."""
    batch = tiny.language_batch(chosen)
    hidden = (torch.arange(batch["labels"].shape[1]) % 3 == 0) & (batch["labels"] != -100)
    batch["labels"][~hidden] = -100
    batch["input_ids"][hidden] = 1
    return batch


def calm_bert(dtype=torch.float64):
    """The tiny BERT with weights a quarter as wide: its derivatives do not magnify the rounding of bfloat16."""
    model = tiny.bert(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.25)
    return model


class Softmax(nn.Module):
    """Linear classifier ``z = W·x`` with cross entropy: its Hessian is its Gauss–Newton matrix."""

    def __init__(self, inputs=5, classes=4, dtype=torch.float64):
        super().__init__()
        start = torch.randn(classes, inputs, generator=tiny.generator(6), dtype=torch.float64)
        self.weight = nn.Parameter(start.to(dtype))

    def forward(self, x, labels=None):
        logits = x @ self.weight.T
        return SimpleNamespace(logits=logits, loss=None if labels is None else F.cross_entropy(logits, labels))


def points(sizes=(3, 6, 2), inputs=5, classes=4, dtype=torch.float64):
    """Batches for :class:`Softmax`."""
    stream = tiny.generator(8)
    return [
        {
            "x": torch.randn(size, inputs, generator=stream, dtype=torch.float64).to(dtype),
            "labels": torch.randint(classes, (size,), generator=stream),
        }
        for size in sizes
    ]


class Classifier(nn.Module):
    """Cross entropy of the logits that ``inner`` makes of inputs x."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, labels=None):
        logits = self.inner(x)
        return SimpleNamespace(logits=logits, loss=None if labels is None else F.cross_entropy(logits, labels))


class Noise(nn.Module):
    """Adds noise to more than ``least`` examples at once, in evaluation mode too."""

    def __init__(self, least=0):
        super().__init__()
        self.least = least

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x) if len(x) > self.least else x


class Attending(nn.Module):
    """Torch's attention of each example to all, whose dropout is no module."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.3)

    def forward(self, x):
        return self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0]


def normed(layer):
    """A classifier with a layer that behaves differently in training (BatchNorm, dropout), or draws random numbers."""
    torch.manual_seed(0)
    return Classifier(nn.Sequential(nn.Linear(5, 6), layer, nn.Tanh(), nn.Linear(6, 4)))


class EachExample(nn.Module):
    """Returns one loss an example instead of their mean."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x):
        return SimpleNamespace(loss=self.weight.square() * x.sum())


class Diagonal(nn.Module):
    """``L = ½·Σ_i d_i·theta_i² − Σ_i theta_i`` at theta = 0, stored in float32."""

    def __init__(self, diagonal):
        super().__init__()
        self.register_buffer("diagonal", diagonal.float())
        self.theta = nn.Parameter(torch.zeros(len(diagonal)))

    def forward(self, x):
        quadratic = 0.5 * (self.diagonal * self.theta.square()).sum()
        return SimpleNamespace(loss=quadratic - self.theta.sum() + 0.0 * x.sum())
