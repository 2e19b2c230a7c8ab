import gc
import weakref

import pytest
import torch

from analysis.core import Objective, WeightSpace, gaussian
from analysis.curvature import DifferenceOperator, GaussNewtonOperator, HessianOperator, spectral_density, trace
from analysis.curvature.graphs import GraphMeter
from bilora.errors import UserError
from tests.oracles import tiny

BATCHES = [tiny.padded(part) for part in tiny.split(tiny.examples())]


@pytest.fixture(scope="module", params=["full", "lora"])
def space(request):
    return {"full": WeightSpace.full, "lora": WeightSpace.lora}[request.param](tiny.with_lora(tiny.bert()))


@pytest.mark.parametrize(("graphs", "budget", "kept"), [("rebuild", 0, 0), ("retain", 0, 4), ("auto", 400_000, None)])
def test_retained_and_rebuilt_products_are_equal(space, graphs, budget, kept):
    objective = Objective(BATCHES)
    with HessianOperator(objective, space, graphs=graphs, budget=budget) as operator:
        for index in range(3):
            v = gaussian(space, 0, index)
            expected, found = objective.hvp(space, v), operator(v)
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-14)
        assert operator.products == 3
        assert operator.retained == kept if kept is not None else 0 < operator.retained < 4
    assert operator.retained == 0


def test_no_batch_is_kept_beyond_the_budget(space):
    operator = HessianOperator(Objective(BATCHES), space, budget=1)
    operator(gaussian(space, 0, 0))
    assert operator.retained == 0


@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
def test_kept_and_rebuilt_graphs_give_the_same_bits(kind):
    own = WeightSpace.full(tiny.bert(dtype=torch.float32))
    v = {name: part.float() for name, part in gaussian(own, 0, 0).items()}
    found = []
    for graphs, budget in (("rebuild", 0), ("retain", 0), ("auto", 200_000)):
        with kind(Objective(BATCHES), own, graphs=graphs, budget=budget) as operator:
            found.append([operator(v) for _ in range(2)])
    for products in found:
        assert all(torch.equal(product[name], part) for product in products for name, part in found[0][0].items())


@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator, DifferenceOperator])
def test_offloaded_products_are_the_same(space, kind):
    """Vector by vector instead of many at once; tests/test_cuda.py has them on two devices."""
    rows = torch.stack([space.flat(gaussian(space, 0, index)) for index in range(3)])
    with kind(Objective(BATCHES), space) as here, kind(Objective(BATCHES), space, offload=True) as away:
        assert torch.equal(away.matmat(rows), here.matmat(rows))
        assert torch.equal(away.gradient(), here.gradient())
        assert away.products == 3


def test_a_kept_graph_holds_no_values_of_the_gradient(space, monkeypatch):
    held, build = [], HessianOperator._build

    def watched(self, index):
        built = build(self, index)
        held.extend(weakref.ref(gradient) for gradient in built)
        return built

    monkeypatch.setattr(HessianOperator, "_build", watched)
    with HessianOperator(Objective(BATCHES), space, graphs="retain") as operator:
        first = operator.gradient()
        assert operator.retained == 4
        assert all(reference() is None for reference in held)
        assert torch.equal(operator.gradient(), first)


def test_the_bytes_of_a_graph_are_those_it_saves():
    meter = GraphMeter(WeightSpace.all(tiny.Quadratic([1.0, 2.0])))
    x = torch.ones(1000, dtype=torch.float64, requires_grad=True)
    with meter.counting():
        (x * x).sin()  # x, saved twice, and its square
    assert (meter.last, meter.bytes) == (16_000, 16_000)
    with meter.counting():
        x[:10].exp() * x[10:20]  # the exponentials, saved twice, and all of x, for a part keeps the whole alive
    assert (meter.last, meter.bytes) == (8_080, 24_080)


def test_weights_are_not_counted_as_part_of_a_graph():
    space = WeightSpace.all(tiny.Quadratic([1.0, 2.0]))
    (weights,) = space.parameters.values()
    meter = GraphMeter(space)
    with meter.counting():
        weights * weights
    assert meter.bytes == 0


@pytest.mark.parametrize(("free", "kept"), [(0, 0), (1 << 40, 4)])
def test_graphs_are_kept_while_memory_is_free(space, monkeypatch, free, kept):
    monkeypatch.setattr("analysis.curvature.graphs.free_memory", lambda device: free)
    operator = HessianOperator(Objective(BATCHES), space)
    operator(gaussian(space, 0, 0))
    assert operator.retained == kept


def test_closing_frees_the_graphs(space, monkeypatch):
    kept, hooks = [], torch.autograd.graph.saved_tensors_hooks

    def recording(pack, unpack):
        def packed(tensor):
            saved = pack(tensor)
            kept.append(weakref.ref(saved))
            return saved

        return hooks(packed, unpack)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", recording)
    with HessianOperator(Objective(BATCHES), space, graphs="retain") as operator:
        operator(gaussian(space, 0, 0))
        assert any(reference() is not None for reference in kept)
    gc.collect()
    assert all(reference() is None for reference in kept)


def test_an_operator_is_bound_to_its_point(space):
    with HessianOperator(Objective(BATCHES), space, graphs="retain") as operator:
        v = gaussian(space, 0, 0)
        before = operator(v)
        with space.perturbed(v, 0.1), pytest.raises(RuntimeError, match="changed"):
            operator(v)
        after = operator(v)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_operator_made_inside_a_perturbation_works_there(space):
    objective, v = Objective(BATCHES), gaussian(space, 0, 0)
    with space.perturbed(v, 0.1):
        with HessianOperator(objective, space, graphs="retain") as operator:
            found = operator(v)
        expected = objective.hvp(space, v)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-14)


def test_a_wrong_vector_is_refused(space):
    with pytest.raises(ValueError, match="no parameter"):
        HessianOperator(Objective(BATCHES), space)({"nowhere": torch.zeros(1)})


def test_weights_changed_in_place_are_noticed():
    own = WeightSpace.full(tiny.bert())
    v = gaussian(own, 0, 0)
    with HessianOperator(Objective(BATCHES), own, graphs="retain") as operator:
        operator(v)
        with torch.no_grad():
            next(iter(own.parameters.values())).mul_(1.5)
        with pytest.raises(RuntimeError, match="changed"):
            operator(v)


def change_of(what, space):
    """Changes what is not in the space, or the mode of a module."""
    if what == "a weight outside":
        with torch.no_grad():
            space.model.get_parameter("bert.embeddings.word_embeddings.weight").mul_(1.5)
    elif what == "a new weight outside":
        space.model.classifier.bias = torch.nn.Parameter(torch.ones_like(space.model.classifier.bias))
    else:
        space.model.bert.encoder.layer[0].attention.train()


@pytest.mark.parametrize("graphs", ["retain", "rebuild"])
@pytest.mark.parametrize("what", ["a weight outside", "a new weight outside", "a module that trains"])
def test_any_change_of_the_model_is_noticed(what, graphs):
    own = WeightSpace.full(tiny.bert())
    v = gaussian(own, 0, 0)
    with HessianOperator(Objective(BATCHES), own, graphs=graphs) as operator:
        operator(v)
        change_of(what, own)
        for ask in (lambda: operator(v), operator.gradient):
            with pytest.raises(RuntimeError, match="changed"):
                ask()
        own.model.eval()
        if what == "a module that trains":
            operator(v)


@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
@pytest.mark.parametrize(("graphs", "forwards"), [("rebuild", [4, 4]), ("retain", [4, 0])])
def test_many_vectors_share_one_graph_a_batch(space, kind, graphs, forwards):
    passes = []
    vectors = [gaussian(space, 0, index) for index in range(6)]
    with kind(Objective(BATCHES), space, graphs=graphs) as operator:
        hook = space.model.register_forward_hook(lambda *_: passes.append(1))
        try:
            counted = []
            for _ in range(2):
                passes.clear()
                operator.many(vectors)
                counted.append(len(passes))
        finally:
            hook.remove()
    assert counted == forwards
    assert operator.products == 12


def test_estimators_ask_for_several_products_at_once(space):
    passes = []
    hook = space.model.register_forward_hook(lambda *_: passes.append(1))
    try:
        trace(Objective(BATCHES), space, max_products=8, backend="hutchinson", graphs="rebuild")
        probes = 2
        assert len(passes) == probes + 2 * 4  # two blocks of four vectors, four batches
        passes.clear()
        spectral_density(Objective(BATCHES), space, runs=4, steps=3, graphs="rebuild")
        assert len(passes) == probes + 3 * 4  # three steps of four runs
    finally:
        hook.remove()


def test_autocast_on_float64_weights_is_refused(space):
    with pytest.raises(UserError, match="float64"):
        HessianOperator(Objective(BATCHES), space, autocast=torch.bfloat16)
