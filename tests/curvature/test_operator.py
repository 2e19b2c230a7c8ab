import gc
import weakref

import pytest
import torch

from analysis.core import Objective, WeightSpace, gaussian
from analysis.curvature import GaussNewtonOperator, HessianOperator
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


def test_autocast_on_float64_weights_is_refused(space):
    with pytest.raises(UserError, match="float64"):
        HessianOperator(Objective(BATCHES), space, autocast=torch.bfloat16)
