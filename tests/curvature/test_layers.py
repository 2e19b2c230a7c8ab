import numpy as np
import pytest
import torch

from analysis import MEASURES
from analysis.core import COLUMNS, Objective, WeightSpace
from analysis.core.measure import Interrupted
from analysis.curvature import top_eigenvalues
from analysis.curvature.blocks import blocks_of
from analysis.curvature.layers import layer_curvature
from analysis.curvature.trace import trace
from analysis.layer_names import NO_NUMBER, kind_of, split_layer
from bilora.errors import UserError
from tests.oracles import tiny

EXAMPLES = tiny.examples()
BATCHES = [tiny.padded(part) for part in tiny.split(EXAMPLES)]


@pytest.fixture(scope="module", params=["full", "lora"])
def case(request):
    """(space, layer → its block of the dense Hessian)."""
    model = tiny.with_lora(tiny.bert())
    H = tiny.ClassifierOracle(tiny.bert(), tiny.factors_of(model), EXAMPLES, request.param).hessian()
    space = {"full": WeightSpace.full, "lora": WeightSpace.lora}[request.param](model)
    rows, start = {}, 0
    for name, parameter in space.parameters.items():
        rows.setdefault(name.rpartition(".")[0], []).append(torch.arange(start, start + parameter.numel()))
        start += parameter.numel()
    return space, {name: H[torch.cat(parts)][:, torch.cat(parts)] for name, parts in rows.items()}


def test_each_layer_has_the_top_eigenvalue_and_trace_of_its_block(case):
    space, blocks = case
    found = layer_curvature(Objective(BATCHES), space, tolerance=1e-5, trace_tolerance=0.3)
    assert list(found.blocks) == list(blocks)
    for name, (spectrum, estimate) in found.blocks.items():
        values = np.linalg.eigvalsh(blocks[name].numpy())
        assert spectrum.converged.all()
        assert spectrum.values[0] == pytest.approx(values[np.abs(values).argmax()], rel=1e-6)
        error = abs(estimate.value - float(blocks[name].trace()))
        assert error <= 6 * estimate.standard_error + 1e-8 * np.abs(values).sum()


def test_rows_of_the_registered_measure(case):
    space, blocks = case
    measure = MEASURES["layers"]
    rows = measure.run(Objective(BATCHES, name="train"), space, measure.settings(by="kind"), None).rows()
    assert all(tuple(row) == COLUMNS and row["measure"] == "layers" for row in rows)
    assert {row["layer"] for row in rows} == {kind_of(name) for name in blocks} == {"attention", "mlp", "other"}
    assert {(row["space"], row["split"]) for row in rows} == {(space.name, "train")}


def test_blocks_by_number_kind_and_pattern():
    space = WeightSpace.full(tiny.bert())
    assert list(blocks_of(space, "number")) == ["0", "1", "none"]
    assert list(blocks_of(space, r"layer\.(\d)\..*(query|key)")) == ["0.query", "0.key", "1.query", "1.key"]
    assert list(blocks_of(space, "query")) == ["query"]
    assert sum(part.size for part in blocks_of(space, "kind").values()) == space.size
    for wrong in ("nothing like it", "("):
        with pytest.raises(UserError, match=r"matches|regular expression"):
            blocks_of(space, wrong)


@pytest.mark.parametrize(
    ("layer", "kind", "number"),
    [
        ("bert.encoder.layer.3.attention.output.dense", "attention", 3),
        ("bert.encoder.layer.3.output.dense", "mlp", 3),
        ("model.layers.11.self_attn.q_proj", "attention", 11),
        ("model.layers.11.mlp.gate_proj", "mlp", 11),
        ("transformer.h.0.attn.c_attn", "attention", 0),
        ("encoder.block.2.layer.0.SelfAttention.q", "attention", 2),
        ("encoder.block.2.layer.1.DenseReluDense.wi_0", "mlp", 2),
        ("model.decoder.layers.5.fc1", "mlp", 5),
        ("classifier", "other", NO_NUMBER),
    ],
)
def test_names_of_common_models(layer, kind, number):
    assert (kind_of(layer), split_layer(layer)[1]) == (kind, number)


@pytest.mark.parametrize("products", [1, 40])
def test_an_interrupt_gives_whole_blocks_alone(products):
    space, seen = WeightSpace.full(tiny.bert()), 0

    def interrupt(done, most, note):
        nonlocal seen
        seen += 1
        if seen == products:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        layer_curvature(Objective(BATCHES), space, watch=interrupt)
    if products == 1:
        assert not isinstance(caught.value, Interrupted)
    else:
        assert all(row["measure"] == "layers" and row["layer"] for row in caught.value.result.rows())


def test_pyhessian_keeps_to_the_block():
    space = WeightSpace.full(tiny.bert())
    part = blocks_of(space)["bert.encoder.layer.1.output.dense"]
    objective = Objective(BATCHES)
    marker = torch.ones_like(next(iter(part.parameters.values())))
    next(iter(part.parameters.values())).grad = marker
    ours = top_eigenvalues(objective, part, 1, tolerance=1e-6)
    theirs = top_eigenvalues(objective, part, 1, tolerance=1e-5, max_products=300, backend="pyhessian")
    assert theirs.values[0] == pytest.approx(ours.values[0], rel=1e-2)
    total = trace(objective, part, tolerance=1e-3, max_products=600, backend="pyhessian")
    assert abs(total.value - trace(objective, part, tolerance=0.02).value) < 5 * total.standard_error
    assert all(parameter.requires_grad for parameter in space.parameters.values())
    assert next(iter(part.parameters.values())).grad is marker
