"""Labels of tokens are weighed as the model's loss reads them, or refused."""

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForTokenClassification

from analysis.core import Objective, WeightSpace
from bilora.errors import UserError
from tests.oracles import modules, tiny

SENTENCES = modules.uneven_examples()
BATCHES = [modules.masked_batch(part) for part in tiny.split(SENTENCES, modules.UNEVEN)]


def tagger():
    config = BertConfig(
        vocab_size=modules.TOKENS, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    config.num_labels = modules.TOKENS
    return BertForTokenClassification(config)


def two_parts():
    config = BartConfig(
        vocab_size=modules.TOKENS,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    return BartForConditionalGeneration(config)


UNSHIFTED = {
    "ForMaskedLM": lambda: modules.masked_bert(torch.float32),
    "ForTokenClassification": tagger,
    "encoder-decoder": two_parts,
    "ForMaskedLM, adapted": lambda: tiny.with_lora(
        modules.masked_bert(torch.float32), None, target_modules=["query", "value"]
    ),
}


@pytest.mark.parametrize("kind", UNSHIFTED)
def test_a_model_that_reads_every_label_is_weighed_by_all_of_them(kind):
    space = WeightSpace.all(UNSHIFTED[kind]())
    ragged, whole = (Objective(batches, shifted=False) for batches in (BATCHES, [modules.masked_batch(SENTENCES)]))
    assert ragged.loss(space) == pytest.approx(whole.loss(space), rel=1e-6)
    wrong = Objective(BATCHES)
    assert wrong.weights != ragged.weights
    for ask in (wrong.loss, wrong.gradient, lambda space: wrong.batch_value(space, 0)):
        with pytest.raises(UserError, match="shifted=False") as refusal:
            ask(space)
        assert kind.partition(",")[0] in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_a_causal_model_and_a_classifier_are_left_alone():
    sentences = tiny.examples((3, 7, 5), vocabulary=30)
    for model, batch in ((tiny.llama(), tiny.language_batch), (tiny.gpt2(), tiny.language_batch)):
        assert Objective([batch(sentences)]).loss(WeightSpace.full(model)) > 0
    assert Objective([tiny.padded(sentences)]).loss(WeightSpace.full(tiny.bert())) > 0
