from functools import cache

import numpy as np
import pytest
import torch

from analysis import MEASURES
from analysis.core import COLUMNS, Objective, WeightSpace
from analysis.core.measure import Interrupted
from analysis.curvature import diagonal, spectral_density, top_eigenvalues
from analysis.curvature.blocks import blocks_of
from analysis.curvature.layers import layer_curvature
from analysis.curvature.trace import trace
from analysis.layer_names import NO_NUMBER, kind_of, split_layer
from bilora.errors import UserError
from tests.oracles import tiny

EXAMPLES = tiny.examples()
BATCHES = [tiny.padded(part) for part in tiny.split(EXAMPLES)]


@cache
def dense(name):
    """(space, dense Hessian, parameter → its rows there)."""
    model = tiny.with_lora(tiny.bert())
    H = tiny.ClassifierOracle(tiny.bert(), tiny.factors_of(model), EXAMPLES, name).hessian()
    space = {"full": WeightSpace.full, "lora": WeightSpace.lora}[name](model)
    rows, start = {}, 0
    for parameter, values in space.parameters.items():
        rows[parameter] = torch.arange(start, start + values.numel())
        start += values.numel()
    return space, H, rows


def diagonal_block(name, parameters):
    """Of the dense Hessian."""
    _, H, rows = dense(name)
    chosen = torch.cat([rows[parameter] for parameter in parameters])
    return H[chosen][:, chosen]


@pytest.fixture(scope="module", params=["full", "lora"])
def case(request):
    """(space, layer → its block of the dense Hessian)."""
    space, _, rows = dense(request.param)
    layers = {}
    for parameter in rows:
        layers.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    return space, {layer: diagonal_block(request.param, parameters) for layer, parameters in layers.items()}


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


PREFIX = "bert.encoder.layer."
PARTS = {
    "kind": {
        "attention": lambda p: ".attention." in p,
        "mlp": lambda p: p.startswith(PREFIX) and ".attention." not in p,
        "other": lambda p: not p.startswith(PREFIX),
    },
    "number": {
        "0": lambda p: p.startswith(f"{PREFIX}0."),
        "1": lambda p: p.startswith(f"{PREFIX}1."),
        "none": lambda p: not p.startswith(PREFIX),
    },
    r"layer\.(\d)\.attention\.self\.(query|value)": {
        "0.query": lambda p: p.startswith(f"{PREFIX}0.attention.self.query."),
        "0.value": lambda p: p.startswith(f"{PREFIX}0.attention.self.value."),
        "1.query": lambda p: p.startswith(f"{PREFIX}1.attention.self.query."),
        "1.value": lambda p: p.startswith(f"{PREFIX}1.attention.self.value."),
    },
}


@pytest.mark.parametrize("name", ["full", "lora"])
@pytest.mark.parametrize("by", PARTS)
def test_blocks_of_any_kind_have_the_curvature_of_their_part_of_the_hessian(name, by):
    space, _, rows = dense(name)
    found = layer_curvature(Objective(BATCHES), space, by=by, tolerance=1e-5, trace_tolerance=0.3)
    assert list(found.blocks) == list(PARTS[by])
    for part, belongs in PARTS[by].items():
        block = diagonal_block(name, [parameter for parameter in rows if belongs(parameter)])
        values = np.linalg.eigvalsh(block.numpy())
        spectrum, estimate = found.blocks[part]
        assert spectrum.converged.all()
        assert spectrum.values[0] == pytest.approx(values[np.abs(values).argmax()], rel=1e-6)
        error = abs(estimate.value - float(block.trace()))
        assert error <= 5 * estimate.standard_error + 1e-8 * np.abs(values).sum()
    # Exact traces of small parts: more probes than entries of the space leave no error.
    space_of, part = blocks_of(space, by), list(PARTS[by])[-1]
    block = diagonal_block(name, space_of[part].parameters)
    exact = trace(Objective(BATCHES), space_of[part], tolerance=1e-6, max_products=2 * len(block))
    assert exact.value == pytest.approx(float(block.trace()), rel=1e-8)


@pytest.mark.parametrize("measure", ["spectrum", "trace", "density"])
def test_rows_of_a_block_name_it(measure):
    space, _, _ = dense("lora")
    part = blocks_of(space, "kind")["mlp"]
    ask = {
        "spectrum": lambda: top_eigenvalues(Objective(BATCHES), part, 1, max_products=3),
        "trace": lambda: trace(Objective(BATCHES), part, max_products=4),
        "density": lambda: spectral_density(Objective(BATCHES), part, runs=1, steps=2),
    }
    assert {(row["space"], row["layer"]) for row in ask[measure]().rows()} == {("lora", "mlp")}
    entries = diagonal(Objective(BATCHES), part, samples=2)
    assert (entries.space, entries.part) == ("lora", "mlp")


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
