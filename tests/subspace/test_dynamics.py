"""Rows of a recorded run against the same quantities from dense matrices."""

import math

import pandas as pd
import pytest
import torch

from analysis.core.factors import Factors
from analysis.core.result import COLUMNS
from analysis.frame import rows_frame
from analysis.subspace.dynamics import run_dynamics
from analysis.subspace.outside import reach_of
from analysis.subspace.perturbations import factored
from bilora.training.recording import About, LayerMoment, Moment, join_moments, read_recording, write_moment

SHAPES = {"encoder.layer.0.a": (9, 7), "encoder.layer.1.b": (6, 11)}
RANK, SCALE, STEPS = 2, 1.5, (0, 5, 10)
ABOUT = About("made", {}, 0, 5, 10)


def made(folder, layer_of, *, finish=True):
    """A recording whose layers come from ``layer_of(step, name, shape, generator)``; the last moment has factors."""
    generator = torch.Generator().manual_seed(0)
    moments = []
    for step in STEPS:
        layers = {name: layer_of(step, shape, generator) for name, shape in SHAPES.items()}
        if step == STEPS[-1]:
            layers = {name: LayerMoment(x.A, x.B, x.scale) for name, x in layers.items()}
        moments.append(Moment(step, layers, {"loss": 1.0, "loss_perturbed": 1.25} if step == 0 else {}))
        write_moment(folder, moments[-1], ABOUT)
    if finish:
        join_moments(folder)
    return moments, rows_frame(run_dynamics(read_recording(folder)).rows())


def normal(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def factor_step(step, shape, generator):
    m, n = shape
    return LayerMoment(
        A=normal(RANK, n, generator=generator),
        B=normal(m, RANK, generator=generator),
        scale=SCALE,
        eps_A=0.1 * normal(RANK, n, generator=generator),
        eps_B=0.1 * normal(m, RANK, generator=generator),
        gradients=(3.0, 4.0),
    )


def auxiliary_step(step, shape, generator):
    m, n = shape
    return LayerMoment(
        A=normal(RANK, n, generator=generator),
        B=normal(m, RANK, generator=generator),
        scale=SCALE,
        auxiliary_A=normal(3, n, generator=generator),
        auxiliary_B=normal(m, 3, generator=generator),
        auxiliary_scale=0.5,
        gradients=(3.0, 4.0, 1.0, 2.0),
    )


def value(frame, quantity, step, layer="", **where):
    rows = frame[(frame["quantity"] == quantity) & (frame["index"] == step) & (frame["layer"] == layer)]
    for column, wanted in where.items():
        rows = rows[rows[column] == wanted]
    assert len(rows) == 1, (quantity, step, layer, where)
    return rows.iloc[0]


def update(x):
    return x.scale * x.B @ x.A


def cosine(left, right):
    inner = sum(float((a * b).sum()) for a, b in zip(left, right, strict=True))
    return inner / math.sqrt(sum(float((a * a).sum()) for a in left) * sum(float((b * b).sum()) for b in right))


def outside(E, x):
    P, Q = x.B @ torch.linalg.pinv(x.B), torch.linalg.pinv(x.A) @ x.A
    return E - P @ E - E @ Q + P @ E @ Q


def test_cosines_and_distances_to_the_end(tmp_path):
    moments, frame = made(tmp_path, auxiliary_step)
    end, last = moments[-1].layers, moments[-2].layers
    for moment in moments:
        here = moment.layers
        mine, ends = [update(x) for x in here.values()], [update(x) for x in end.values()]
        at = {"space": "full", "kind": "primary"}
        assert value(frame, "cosine_to_end", moment.step, **at)["value"] == pytest.approx(cosine(mine, ends), rel=1e-10)
        for name, x in here.items():
            dense = cosine([update(x)], [update(end[name])])
            assert value(frame, "cosine_to_end", moment.step, name, **at)["value"] == pytest.approx(dense, rel=1e-10)
            far = float((update(x) - update(end[name])).norm() / update(end[name]).norm())
            found = value(frame, "distance_to_end", moment.step, name, **at)["value"]
            assert found == pytest.approx(far, rel=1e-9, abs=1e-7)
        flat = [torch.cat([x.A.flatten(), x.B.flatten()]) for x in here.values()]
        final = [torch.cat([x.A.flatten(), x.B.flatten()]) for x in end.values()]
        found = value(frame, "cosine_to_end", moment.step, space="lora", kind="primary")["value"]
        assert found == pytest.approx(cosine(flat, final), rel=1e-10)
    for moment in moments[:-1]:
        pairs = [0.5 * x.auxiliary_B @ x.auxiliary_A for x in moment.layers.values()]
        settled = [0.5 * x.auxiliary_B @ x.auxiliary_A for x in last.values()]
        found = value(frame, "cosine_to_end", moment.step, space="full", kind="auxiliary")["value"]
        assert found == pytest.approx(cosine(pairs, settled), rel=1e-10)
        between = cosine([update(x) for x in moment.layers.values()], pairs)
        found = value(frame, "cosine", moment.step, space="full", kind="primary_auxiliary")["value"]
        assert found == pytest.approx(between, rel=1e-10)
    # Of ranks 2 and 3 the factors have no cosine.
    assert frame[(frame["quantity"] == "cosine") & (frame["space"] == "lora")].empty


def test_parts_of_a_perturbation_of_the_factors(tmp_path):
    moments, frame = made(tmp_path, factor_step)
    for moment in moments[:-1]:
        squares = dict.fromkeys(("B_eps_A", "eps_B_A", "eps_B_eps_A", "first"), 0.0)
        for name, x in moment.layers.items():
            dense = {"B_eps_A": x.B @ x.eps_A, "eps_B_A": x.eps_B @ x.A, "eps_B_eps_A": x.eps_B @ x.eps_A}
            dense["first"] = dense["B_eps_A"] + dense["eps_B_A"]
            for kind, product in dense.items():
                squares[kind] += float((SCALE * product).square().sum())
                if kind != "first":
                    found = value(frame, "perturbation_part", moment.step, name, kind=kind)["value"]
                    assert found == pytest.approx(float((SCALE * product).norm()), rel=1e-10)
            ratio = float(dense["eps_B_eps_A"].norm() / dense["first"].norm())
            assert value(frame, "second_order_ratio", moment.step, name)["value"] == pytest.approx(ratio, rel=1e-10)
        for kind in ("B_eps_A", "eps_B_A", "eps_B_eps_A"):
            found = value(frame, "perturbation_part", moment.step, kind=kind)["value"]
            assert found == pytest.approx(math.sqrt(squares[kind]), rel=1e-10)
        together = math.sqrt(squares["eps_B_eps_A"] / squares["first"])
        assert value(frame, "second_order_ratio", moment.step)["value"] == pytest.approx(together, rel=1e-10)


@pytest.mark.parametrize("kind", ["factors", "auxiliary"])
def test_outside_share_is_that_of_the_dense_perturbation(tmp_path, kind):
    moments, frame = made(tmp_path, factor_step if kind == "factors" else auxiliary_step)
    for moment in moments[:-1]:
        above = below = 0.0
        for name, x in moment.layers.items():
            if kind == "factors":
                E = SCALE * ((x.B + x.eps_B) @ (x.A + x.eps_A) - x.B @ x.A)
            else:
                E = 0.5 * x.auxiliary_B @ x.auxiliary_A
            out, whole = float(outside(E, x).square().sum()), float(E.square().sum())
            above, below = above + out, below + whole
            found = value(frame, "outside_share", moment.step, name)
            assert found["value"] == pytest.approx(out / whole, rel=1e-9)
            m, n = E.shape
            assert found["chance"] == pytest.approx((1 - RANK / m) * (1 - RANK / n))
            assert found["induced_norm"] == pytest.approx(math.sqrt(whole), rel=1e-10)
        assert value(frame, "outside_share", moment.step)["value"] == pytest.approx(above / below, rel=1e-9)


def test_the_test_against_chance_is_that_of_saved_adapters(tmp_path):
    """Of one layer and of all, as ``reach_of`` makes it; tests/subspace/test_rotations.py shows that it is right."""
    moments, frame = made(tmp_path, auxiliary_step)
    first = moments[0]
    factors = {name: Factors(x.B, x.A, SCALE) for name, x in first.layers.items()}
    eps = {name: factored(Factors(x.auxiliary_B, x.auxiliary_A, 0.5)) for name, x in first.layers.items()}
    gradient = {f"{name}.weight": torch.ones(len(f.B), f.A.shape[1]) for name, f in factors.items()}
    expected = [r for r in reach_of("auxiliary", eps, factors, gradient).rows() if "share_p" in r["quantity"]]
    assert len(expected) == len(first.layers) + 1
    for r in expected:
        found = value(frame, "outside_share_p_value", first.step, r["layer"])["value"]
        assert 0 < found < 1
        assert found == pytest.approx(r["value"], rel=1e-9)


def test_first_order_perturbations_of_the_factors_are_within_reach(tmp_path):
    def small(step, shape, generator):
        x = factor_step(step, shape, generator)
        return LayerMoment(x.A, x.B, x.scale, 1e-7 * x.eps_A, 1e-7 * x.eps_B)

    _, frame = made(tmp_path, small)
    shares = frame[frame["quantity"] == "outside_share"]["value"]
    assert len(shares) == 6
    assert (shares < 1e-13).all()
    assert (frame[frame["quantity"] == "outside_share_p_value"]["value"] < 1e-12).all()


def test_noise_is_read_as_it_was_summed_up(tmp_path):
    def noisy(step, shape, generator):
        x = factor_step(step, shape, generator)
        return LayerMoment(x.A, x.B, x.scale, noise=(4.0, 3.0) if shape == (9, 7) else (1.0, 0.5))

    _, frame = made(tmp_path, noisy)
    assert value(frame, "outside_share", 0, "encoder.layer.0.a")["value"] == 0.75
    whole = value(frame, "outside_share", 0)
    assert whole["value"] == pytest.approx(3.5 / 5)
    assert whole["induced_norm"] == pytest.approx(math.sqrt(5))
    assert "outside_share_p_value" not in set(frame["quantity"])  # the singular values were not recorded


def test_norms_balance_and_numbers(tmp_path):
    moments, frame = made(tmp_path, auxiliary_step)
    x = moments[0].layers["encoder.layer.0.a"]
    found = value(frame, "balancedness", 0, "encoder.layer.0.a")["value"]
    assert found == pytest.approx(0.5 * float(x.B.square().sum() - x.A.square().sum()), rel=1e-12)
    norms = [float(update(y).norm()) for y in moments[0].layers.values()]
    assert value(frame, "update_norm", 0, kind="primary")["value"] == pytest.approx(math.hypot(*norms), rel=1e-10)
    assert value(frame, "gradient_norm", 0, kind="A")["value"] == pytest.approx(math.sqrt(2) * 3)
    assert value(frame, "gradient_norm", 0, kind="auxiliary_B")["value"] == pytest.approx(math.sqrt(2) * 2)
    assert value(frame, "loss_rise", 0)["value"] == 0.25
    assert [*frame.columns] == [*COLUMNS]
    assert not frame.duplicated(["quantity", "space", "kind", "layer", "index"]).any()


@pytest.mark.parametrize("step_of", [factor_step, auxiliary_step])
def test_merged_quantities_do_not_depend_on_the_gauge(tmp_path, step_of):
    """A → cA, B → B/c, eps likewise: what is said of W stays, what is said of factors does not."""
    c = 3.0

    def rescaled(step, shape, generator):
        x = step_of(step, shape, generator)
        own = {"A": c * x.A, "B": x.B / c, "scale": x.scale, "gradients": x.gradients}
        if x.eps_A is not None:
            own |= {"eps_A": c * x.eps_A, "eps_B": x.eps_B / c}
        else:
            own |= {
                "auxiliary_A": c * x.auxiliary_A,
                "auxiliary_B": x.auxiliary_B / c,
                "auxiliary_scale": x.auxiliary_scale,
            }
        return LayerMoment(**own)

    _, first = made(tmp_path / "first", step_of)
    _, second = made(tmp_path / "second", rescaled)
    keys = ["quantity", "space", "kind", "layer", "index"]
    both = first.merge(second, on=keys, suffixes=("", "_rescaled"))
    assert len(both) == len(first)
    invariant = both[(both["space"] == "full") | (both["quantity"] == "overlap")]
    assert len(invariant) > 20
    pd.testing.assert_series_equal(
        invariant["value"], invariant["value_rescaled"], check_names=False, rtol=1e-9, atol=1e-7
    )
    balance = both[both["quantity"] == "balancedness"]
    assert not (balance["value"] == balance["value_rescaled"]).any()


def test_a_run_in_progress_is_read_up_to_its_last_moment(tmp_path):
    _, frame = made(tmp_path, auxiliary_step, finish=False)
    assert set(frame["index"]) == set(STEPS)
    assert value(frame, "cosine_to_end", 10, space="full", kind="primary")["value"] == pytest.approx(1)


def test_zero_factors_give_no_number_but_no_error(tmp_path):
    def fresh(step, shape, generator):
        x = auxiliary_step(step, shape, generator)
        zero = torch.zeros_like
        return x if step else LayerMoment(x.A, zero(x.B), x.scale, None, None, x.auxiliary_A, zero(x.auxiliary_B), 0.5)

    _, frame = made(tmp_path, fresh)
    assert math.isnan(value(frame, "cosine_to_end", 0, space="full", kind="primary")["value"])
    assert math.isnan(value(frame, "outside_share", 0)["value"])
    assert math.isnan(value(frame, "overlap", 0, kind="column")["value"])
