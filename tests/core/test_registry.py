import pytest

from analysis import MEASURES, measure_named, quality
from analysis.core import COLUMNS, Objective, WeightSpace
from bilora.errors import UserError
from tests.oracles import tiny


def test_quality_is_loss_and_accuracy_in_any_space():
    model, objective = tiny.with_lora(tiny.bert()), Objective([tiny.padded(tiny.examples())], name="train")
    found = quality(objective, WeightSpace.full(model))
    assert quality(objective, WeightSpace.lora(model)).loss == pytest.approx(found.loss, rel=1e-12)
    rows = MEASURES["quality"].run(objective, WeightSpace.full(model), MEASURES["quality"].settings(), None).rows()
    values = {"loss": found.loss, "accuracy": found.accuracy, "matthews": found.matthews}
    assert {r["quantity"]: r["value"] for r in rows} == values
    assert values == objective.evaluate(WeightSpace.full(model))
    assert all(tuple(r) == COLUMNS and (r["space"], r["split"]) == ("", "train") for r in rows)


def test_the_registry_knows_every_measure():
    assert list(MEASURES) == [
        "quality",
        "random",
        "adversarial",
        "worst_case",
        "m_sharpness",
        "ascent_gap",
        "quantisation",
        "read_noise",
        "spectrum",
        "trace",
        "density",
        "layers",
        "landscape",
        "surface",
        "subspace",
        "dynamics",
        "update",
        "efficiency",
    ]
    assert all(name == measure.name for name, measure in MEASURES.items())
    with pytest.raises(UserError, match="choose one of quality, random"):
        measure_named("flatness")


@pytest.mark.parametrize("name", [name for name, measure in MEASURES.items() if "all" in measure.offered])
def test_measures_of_any_vector_take_all_parameters(name):
    small = {"directions": 2, "k": 1, "m": 7, "points": 5, "runs": 2, "restarts": 1}
    fields = MEASURES[name].settings.model_fields
    settings = MEASURES[name].settings(**{key: value for key, value in small.items() if key in fields})
    objective = Objective([tiny.padded(part) for part in tiny.split(tiny.examples())])
    rows = MEASURES[name].result(objective, WeightSpace.all(tiny.with_lora(tiny.bert())), settings).rows()
    assert {row["space"] for row in rows} == {"all"}
