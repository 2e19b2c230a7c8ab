"""Curvature products against dense float64 matrices that are formed without the project's code."""

import re
from functools import cache

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import nn

from analysis.core import Objective, WeightSpace
from analysis.curvature import (
    DifferenceOperator,
    GaussNewtonOperator,
    HessianOperator,
    curvature_operator,
    top_eigenvalues,
)
from bilora.errors import UserError
from tests.oracles import modules, tiny
from tests.oracles.dense import DenseOracle, flat, relative_error

EXAMPLES = tiny.examples()
BATCHES = [tiny.padded(part) for part in tiny.split(EXAMPLES)]
SENTENCES = modules.uneven_examples()
TOKEN_BATCHES = [tiny.language_batch(part) for part in tiny.split(SENTENCES, modules.UNEVEN)]
ALL_TOKENS = tiny.language_batch(SENTENCES)
OPERATORS = {"hessian": HessianOperator, "ggn": GaussNewtonOperator}
GRAPHS = ("retain", "rebuild", "auto")
EMBEDDINGS_AND_NORMS = r"model\.embed_tokens\.weight|.*norm\.weight"
# GPT-2 stores these (in, out); a space holds them (out, in).
CONV1D = r".*\.(c_attn|c_proj|c_fc)\.weight"


class Case:
    """A space, the objective on ragged batches, and the dense matrices on all examples in one batch."""

    def __init__(self, space, batches, oracle):
        assert torch.equal(flat(space.parameters.values()), oracle.point)
        self.space, self.objective = space, Objective(batches, shifted=oracle.shifted)
        self.dense = {"hessian": oracle.hessian(), "ggn": oracle.gauss_newton()}
        for matrix in self.dense.values():
            assert float((matrix - matrix.T).abs().max()) <= 1e-12 * float(matrix.abs().max())
        assert relative_error(self.dense["ggn"], self.dense["hessian"]) > 0.01


@cache
def adapted_bert(name):
    model = tiny.with_lora(tiny.bert())
    oracle = getattr(DenseOracle, name)(tiny.bert(), tiny.factors_of(model), tiny.padded(EXAMPLES))
    return Case(getattr(WeightSpace, name)(model), BATCHES, oracle)


def tied_llama(pattern=None):
    model = modules.small_llama()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    space = WeightSpace.all(model) if pattern is None else WeightSpace.named(model, pattern)
    chosen = [name for name, _ in model.named_parameters() if re.fullmatch(pattern or ".*", name)]
    assert list(space.parameters) == chosen
    return Case(space, TOKEN_BATCHES, DenseOracle.named(modules.small_llama(), ALL_TOKENS, chosen))


def masked_bert():
    """Every parameter: tied embeddings, LayerNorm gains, biases; a sixth to a third of the tokens count."""
    model = modules.masked_bert()
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    names = [name for name, _ in model.named_parameters()]
    whole = modules.masked_batch(SENTENCES)
    oracle = DenseOracle.named(modules.masked_bert(), whole, names, shifted=False)
    ragged = [modules.masked_batch(part) for part in tiny.split(SENTENCES, modules.UNEVEN)]
    return Case(WeightSpace.all(model), ragged, oracle)


def plain_gpt2():
    chosen = tiny.examples((3, 7, 5, 2, 4), vocabulary=30)
    names = [name for name, _ in tiny.gpt2().named_parameters() if re.fullmatch(CONV1D, name)]
    oracle = DenseOracle.named(tiny.gpt2(), tiny.language_batch(chosen), names, transposed=names)
    ragged = [tiny.language_batch(part) for part in tiny.split(chosen, (2, 3))]
    return Case(WeightSpace.full(modules.unrounded(tiny.gpt2())), ragged, oracle)


CASES = {
    "full": lambda: adapted_bert("full"),
    "lora": lambda: adapted_bert("lora"),
    "every parameter of a tied Llama": tied_llama,
    "tied embeddings and norms": lambda: tied_llama(EMBEDDINGS_AND_NORMS),
    "every parameter of a tied masked BERT": masked_bert,
    "GPT-2": plain_gpt2,
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]()


@pytest.fixture(scope="module")
def lora():
    return adapted_bert("lora")


@pytest.fixture(scope="module")
def layer():
    """The adapted BERT restricted to the weight of one layer, and its full space."""
    full = adapted_bert("full")
    space = WeightSpace.named(tiny.with_lora(tiny.bert()), r"bert\.encoder\.layer\.1\.attention\.self\.value\.weight")
    return space, full


def rows(space, count, seed=0, dtype=torch.float64):
    """(count, n): rows of independent normal entries."""
    stream = tiny.generator(seed)
    return torch.randn(count, space.size, generator=stream, dtype=torch.float64).to(dtype)


def assembled(operator):
    """(n, n): the matrix that the operator applies."""
    return operator.matmat(torch.eye(operator.size, dtype=operator.dtype)).T


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("curvature", OPERATORS)
def test_products_are_those_of_the_dense_matrix(case, curvature, graphs):
    V = rows(case.space, 3)
    with OPERATORS[curvature](case.objective, case.space, graphs=graphs) as operator:
        found = operator.matmat(V)
    expected = V @ case.dense[curvature]
    for i in range(len(V)):
        assert relative_error(found[i], expected[i]) <= 1e-12


@pytest.mark.parametrize("curvature", OPERATORS)
def test_every_way_to_ask_gives_the_same_product(case, curvature):
    space, V = case.space, rows(case.space, 4)
    with OPERATORS[curvature](case.objective, space) as operator:
        assert (operator.size, operator.dtype, operator.device.type) == (space.size, torch.float64, "cpu")
        assert operator.products == 0
        together = operator.matmat(V)
        assert operator.products == 4
        vectors = [space.named_vector(v) for v in V]
        many = [flat(product.values()) for product in operator.many(vectors)]
        assert operator.products == 8
        for i, v in enumerate(V):
            assert torch.equal(space.flat(vectors[i]), v)
            single = operator(vectors[i])
            assert list(single) == list(space.parameters)
            for other in (together[i], many[i], operator.matmat(v[None])[0]):
                assert relative_error(other, flat(single.values())) <= 1e-13
        assert operator.products == 16


@pytest.mark.parametrize("curvature", OPERATORS)
def test_products_are_symmetric_and_linear(case, curvature):
    u, v = rows(case.space, 2, seed=1)
    with OPERATORS[curvature](case.objective, case.space) as operator:
        Hu, Hv, Hw, zero = operator.matmat(torch.stack([u, v, 2 * u - 3 * v, 0 * u]))
    assert abs(float(u @ Hv - v @ Hu)) <= 1e-12 * float(u.norm() * Hv.norm())
    assert relative_error(Hw, 2 * Hu - 3 * Hv) <= 1e-12
    assert not zero.any()


@pytest.mark.parametrize("curvature", OPERATORS)
def test_a_layer_has_its_block_of_the_whole_matrix(layer, curvature):
    space, full = layer
    (name,) = space.parameters
    before = list(full.space.parameters).index(name)
    start = sum(p.numel() for p in list(full.space.parameters.values())[:before])
    block = full.dense[curvature][start : start + space.size, start : start + space.size]
    with OPERATORS[curvature](full.objective, space) as operator:
        assert relative_error(assembled(operator), block) <= 1e-12


@pytest.mark.parametrize("curvature", OPERATORS)
def test_tokens_of_uneven_batches_count_alike(curvature):
    ragged, whole = Objective(TOKEN_BATCHES), Objective([ALL_TOKENS])
    assert ragged.weights == (13, 24, 52)
    space = WeightSpace.full(modules.small_llama())
    V = rows(space, 2)
    with OPERATORS[curvature](ragged, space) as many, OPERATORS[curvature](whole, space) as one:
        found, expected = many.matmat(V), one.matmat(V)
        by_batch = []
        for batch in TOKEN_BATCHES:
            with OPERATORS[curvature](Objective([batch]), space) as alone:
                by_batch.append(alone.matmat(V))
    assert relative_error(found, expected) <= 1e-12
    # The mean of the batches' means is another matrix: the test tells right from wrong weights.
    assert relative_error(sum(by_batch) / 3, expected) > 0.01


@pytest.mark.parametrize("curvature", OPERATORS)
def test_scipy_finds_the_dense_eigenvalues_through_the_operator(lora, curvature):
    dense = np.linalg.eigvalsh(lora.dense[curvature].numpy())
    with OPERATORS[curvature](lora.objective, lora.space, graphs="retain") as operator:
        linear = operator.as_linear_operator()
        assert linear.shape == (lora.space.size,) * 2
        assert linear.dtype == np.float64
        found = eigsh(linear, 4, which="LA", tol=1e-12, v0=np.ones(lora.space.size), return_eigenvectors=False)
        block = linear @ np.eye(lora.space.size)[:, :3]
        first = np.eye(lora.space.size)[0]
        column = lora.dense[curvature][:, 0].numpy()
        for same in (linear.T, linear.H):
            np.testing.assert_allclose(same @ first, column, atol=1e-12 * np.abs(dense).max())
        np.testing.assert_allclose(linear.rmatvec(first), column, atol=1e-12 * np.abs(dense).max())
    np.testing.assert_allclose(np.sort(found), dense[-4:], rtol=1e-10)
    np.testing.assert_allclose(block, lora.dense[curvature][:, :3], atol=1e-12 * np.abs(dense).max())


def test_the_gauss_newton_matrix_has_no_negative_eigenvalue(layer):
    space, full = layer
    with GaussNewtonOperator(full.objective, space) as operator:
        values = torch.linalg.eigvalsh(assembled(operator))
    assert float(values[0]) >= -1e-12 * float(values[-1])
    with HessianOperator(full.objective, space) as operator:
        values = torch.linalg.eigvalsh(assembled(operator))
    assert float(values[0]) < -1e-3 * float(values[-1])


def test_hessian_and_gauss_newton_matrix_of_a_linear_classifier_are_equal():
    space, batches = WeightSpace.all(modules.Softmax()), modules.points()
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    dense = DenseOracle.named(modules.Softmax(), whole, ["weight"]).hessian()
    for kind in OPERATORS.values():
        with kind(Objective(batches), space) as operator:
            assert relative_error(assembled(operator), dense) <= 1e-12


def test_labels_name_what_is_not_the_exact_hessian(lora):
    cases = {
        "": {},
        "ggn": {"curvature": "ggn"},
        "central differences": {"differences": "central"},
        "one-sided differences": {"differences": "one-sided"},
    }
    (v,) = rows(lora.space, 1)
    expected = {label: lora.dense["ggn" if label == "ggn" else "hessian"] @ v for label in cases}
    for label, settings in cases.items():
        with curvature_operator(lora.objective, lora.space, **settings) as operator:
            assert operator.label == label
            assert relative_error(operator.matmat(v[None])[0], expected[label]) <= (1e-3 if "diff" in label else 1e-12)


@pytest.mark.parametrize("curvature", OPERATORS)
def test_eigenvalues_of_a_tied_masked_bert_are_numpys(curvature):
    found_in = masked_bert()
    dense = np.linalg.eigvalsh(found_in.dense[curvature].numpy())
    expected = dense[np.argsort(-np.abs(dense))][:5]
    settings = {"curvature": curvature, "tolerance": 1e-8, "max_products": 400}
    found = top_eigenvalues(found_in.objective, found_in.space, 5, **settings)
    assert found.converged.all()
    np.testing.assert_allclose(found.values, expected, rtol=1e-10)


# Rounding of the gradient over the step, plus the curvature's own change along the step.
DIFFERENCES = [
    ("central", torch.float32, 2e-3),
    ("one-sided", torch.float32, 2e-2),
    ("central", torch.float64, 1e-7),
    ("one-sided", torch.float64, 1e-5),
]


@pytest.mark.parametrize("name", ["full", "lora"])
@pytest.mark.parametrize(("kind", "dtype", "bound"), DIFFERENCES)
def test_differences_of_gradients_come_close_and_leave_the_weights_alone(name, kind, dtype, bound):
    dense = adapted_bert(name).dense["hessian"]
    space = getattr(WeightSpace, name)(tiny.with_lora(tiny.bert(dtype)))
    before = {key: p.detach().clone() for key, p in space.model.named_parameters()}
    V = rows(space, 3, dtype=dtype)
    with DifferenceOperator(Objective(BATCHES), space, kind=kind) as operator:
        assert operator.dtype == dtype
        found = {scale: operator.matmat(scale * V) for scale in (1.0, 1e6, 1e-6)}
    for scale, products in found.items():
        for product, v in zip(products, V, strict=True):
            assert relative_error(product / scale, dense @ v.double()) <= bound
    for key, p in space.model.named_parameters():
        assert torch.equal(p, before[key])


@pytest.mark.parametrize(("kind", "dtype", "bound"), DIFFERENCES)
@pytest.mark.parametrize("scale", [2.0**-20, 1.0, 2.0**20])
def test_differences_do_not_depend_on_the_scale_of_the_weights(kind, dtype, bound, scale):
    # c·W on x/c is the same function: its Hessian is 1/c² of the one at W, and so is every difference.
    model, batches = modules.Softmax(dtype=dtype), modules.points(dtype=dtype)
    with torch.no_grad():
        model.weight.mul_(scale)
    for batch in batches:
        batch["x"] /= scale
    whole = {key: torch.cat([batch[key] for batch in modules.points()]) for key in ("x", "labels")}
    dense = DenseOracle.named(modules.Softmax(), whole, ["weight"]).hessian()
    space = WeightSpace.all(model)
    V = rows(space, 3, dtype=dtype)
    with DifferenceOperator(Objective(batches), space, kind=kind) as operator:
        found = operator.matmat(V).double() * scale**2
    for product, v in zip(found, V, strict=True):
        assert relative_error(product, dense @ v.double()) <= bound


def test_a_difference_along_nothing_is_nothing(lora):
    with DifferenceOperator(lora.objective, lora.space, kind="central") as operator:
        assert not operator.matmat(torch.zeros(2, operator.size, dtype=operator.dtype)).any()


@pytest.mark.parametrize("curvature", OPERATORS)
def test_bfloat16_products_come_close_and_leave_the_weights_alone(curvature):
    space = WeightSpace.full(modules.calm_bert(torch.float32))
    oracle = DenseOracle.named(modules.calm_bert(), tiny.padded(EXAMPLES), list(space.parameters))
    dense = oracle.hessian() if curvature == "hessian" else oracle.gauss_newton()
    before = {key: p.detach().clone() for key, p in space.model.named_parameters()}
    V = rows(space, 3, dtype=torch.float32)
    with OPERATORS[curvature](Objective(BATCHES), space, autocast=torch.bfloat16) as operator:
        found = operator.matmat(V)
    assert found.dtype == torch.float32
    for product, v in zip(found, V, strict=True):
        assert 1e-5 < relative_error(product, dense @ v.double()) <= 2e-2
    for key, p in space.model.named_parameters():
        assert torch.equal(p, before[key])


ALL_OPERATORS = {**OPERATORS, "differences": DifferenceOperator}


@pytest.mark.parametrize("kind", ALL_OPERATORS)
@pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.BatchNorm1d(6)], ids=["dropout", "BatchNorm"])
def test_a_model_in_training_mode_is_refused(layer, kind):
    space = WeightSpace.all(modules.normed(layer))
    objective = Objective(modules.points(dtype=torch.float32))
    ALL_OPERATORS[kind](objective, space).matmat(torch.ones(1, space.size))
    space.model.train()
    with pytest.raises(UserError, match=r"eval\(\)") as refusal:
        ALL_OPERATORS[kind](objective, space)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ALL_OPERATORS)
@pytest.mark.parametrize("least", [0, 5], ids=["every batch", "the largest batch alone"])
def test_a_model_that_draws_random_numbers_is_refused(least, kind):
    space = WeightSpace.all(modules.normed(modules.Noise(least)))
    state = torch.get_rng_state()
    with pytest.raises(UserError, match="switch them off in its forward") as refusal:
        ALL_OPERATORS[kind](Objective(modules.points(dtype=torch.float32)), space)
    assert "\n" not in str(refusal.value)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_inside_torchs_attention_is_noticed_while_it_trains():
    space, objective = (
        WeightSpace.all(modules.normed(modules.Attending())),
        Objective(modules.points(dtype=torch.float32)),
    )
    HessianOperator(objective, space)
    space.model.train()
    with pytest.raises(UserError, match=r"call space\.model\.eval\(\) first"):
        HessianOperator(objective, space)


@pytest.mark.parametrize("kind", ALL_OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_refused(kind, dtype):
    model = modules.Softmax(dtype=dtype)
    space = WeightSpace("by hand", model, dict(model.named_parameters()), {})
    with pytest.raises(UserError, match="float32") as refusal:
        ALL_OPERATORS[kind](Objective(modules.points(dtype=dtype)), space)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ALL_OPERATORS)
def test_a_space_without_weights_is_refused(kind):
    model = modules.Softmax()
    with pytest.raises(UserError, match="no parameter") as refusal:
        ALL_OPERATORS[kind](Objective(modules.points()), WeightSpace("by hand", model, {}, {}))
    assert "\n" not in str(refusal.value)


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(UserError, match="no parameter name matches") as refusal:
        WeightSpace.named(modules.Softmax(), "decoder.*")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ALL_OPERATORS)
def test_a_loss_that_is_no_single_number_is_refused(kind):
    space = WeightSpace.all(modules.EachExample())
    with pytest.raises(UserError, match="loss") as refusal:
        ALL_OPERATORS[kind](Objective([{"x": torch.ones(2, 1, dtype=torch.float64)}]), space).matmat(rows(space, 1))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ALL_OPERATORS)
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_loss_that_is_not_finite_is_refused(kind, bad):
    batches = modules.points()
    batches[1]["x"][0, 0] = bad
    space = WeightSpace.all(modules.Softmax())
    with pytest.raises(UserError, match="finite") as refusal:
        ALL_OPERATORS[kind](Objective(batches), space).matmat(rows(space, 1))
    assert "\n" not in str(refusal.value)


def test_curvature_that_no_one_knows_is_refused(lora):
    for settings in ({"curvature": "fisher"}, {"graphs": "keep"}, {"differences": "forward"}):
        with pytest.raises(UserError, match="choose") as refusal:
            curvature_operator(lora.objective, lora.space, **settings)
        assert "\n" not in str(refusal.value)
