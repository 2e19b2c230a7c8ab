"""Leaving out what no head reads changes nothing; where it would, it is not done."""

import pytest
import torch
from torch import nn
from transformers import (
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from analysis.core import Objective, WeightSpace
from analysis.core.needed import run_model
from tests.oracles import tiny
from tests.sharpness.cases import flat

SMALL = {
    "vocab_size": 40,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "num_labels": 3,
    "initializer_range": 0.4,
}


class MeanForSequenceClassification(BertForSequenceClassification):
    """Its head reads every position."""

    def forward(self, labels=None, **inputs):
        hidden = self.bert(**inputs).last_hidden_state
        logits = self.classifier(hidden.mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def bert():
    return tiny.bert()


def roberta():
    return RobertaForSequenceClassification(RobertaConfig(**SMALL, pad_token_id=0)).double()


def electra():
    return ElectraForSequenceClassification(ElectraConfig(**SMALL, embedding_size=8)).double()


def distilbert():
    config = DistilBertConfig(
        vocab_size=40, dim=8, n_layers=2, n_heads=2, hidden_dim=12, max_position_embeddings=16, num_labels=3
    )
    return DistilBertForSequenceClassification(config).double()


def mean():
    return MeanForSequenceClassification(tiny.bert().config).double()


def lengths_seen(model):
    """Positions that the last feed-forward network is given, call by call."""
    seen = []
    body = getattr(model, model.base_model_prefix)
    layers = body.transformer.layer if hasattr(body, "transformer") else body.encoder.layer
    network = layers[-1].ffn if hasattr(layers[-1], "ffn") else layers[-1].intermediate
    network.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    return seen


def objective():
    return Objective([tiny.padded(part) for part in tiny.split(tiny.examples())])


@pytest.mark.parametrize("make", [bert, roberta, electra, distilbert])
def test_one_position_is_computed_and_nothing_else_changes(make):
    torch.manual_seed(0)
    model = make().eval()
    whole, short = WeightSpace.all(model), WeightSpace.all(model)
    data = objective()
    seen = lengths_seen(short.model)
    got = data.evaluate(short)
    assert seen[0] > 1  # once, to compare
    assert set(seen[1:]) == {1}

    losses = []
    for batch, weight in zip(data.batches, data.weights, strict=True):
        losses.append(weight * whole.model(**batch).loss)
    expected = torch.stack(losses).sum() / data.weight
    assert got["loss"] == pytest.approx(float(expected.detach()), rel=1e-13)
    names = list(whole.parameters)
    exact = torch.autograd.grad(expected, list(whole.parameters.values()), allow_unused=True, materialize_grads=True)
    gradient = data.gradient(short)
    torch.testing.assert_close(flat(gradient), flat(dict(zip(names, exact, strict=True))), rtol=1e-10, atol=1e-14)


def test_second_derivatives_stay():
    space = WeightSpace.full(tiny.with_lora(tiny.bert()))
    data = objective()
    vector = {n: torch.ones_like(p) for n, p in space.parameters.items()}
    data.loss(space)
    short = flat(data.hvp(space, vector))
    long = torch.zeros_like(short)
    for batch, weight in zip(data.batches, data.weights, strict=True):
        space.model.config._attn_implementation = "eager"
        loss = space.model(**batch).loss
        parameters = list(space.parameters.values())
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        inner = sum((g * v).sum() for g, v in zip(gradients, vector.values(), strict=True))
        parts = torch.autograd.grad(inner, parameters, allow_unused=True, materialize_grads=True)
        long += torch.cat([part.flatten() for part in parts]) * weight / data.weight
    torch.testing.assert_close(short, long, rtol=1e-10, atol=1e-14)


def test_a_head_that_reads_every_position_gets_them():
    torch.manual_seed(0)
    model = mean().eval()
    seen = lengths_seen(model)
    batch = tiny.padded(tiny.examples()[:3])
    expected = model(**batch)["logits"]
    for _ in range(2):
        seen.clear()
        assert torch.equal(run_model(model, batch)["logits"], expected)
        assert seen[-1] == 9


def test_language_models_are_run_as_they_are():
    model = tiny.llama(torch.float64).eval()
    batch = tiny.language_batch(tiny.examples(vocabulary=30)[:3])
    assert torch.equal(run_model(model, batch).logits, model(**batch).logits)


def test_nothing_is_decided_on_losses_that_are_not_finite():
    model = tiny.bert().eval()
    batch = tiny.padded(tiny.examples()[:3])
    seen = lengths_seen(model)
    with torch.no_grad():
        model.classifier.bias.fill_(torch.inf)
        assert not bool(run_model(model, batch).loss.isfinite())
        model.classifier.bias.zero_()
        expected = model(**batch).loss
        seen.clear()
        assert float(run_model(model, batch).loss) == pytest.approx(float(expected), rel=1e-13)
    assert seen == [9, 1, 1]
