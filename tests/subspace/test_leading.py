"""Leading spaces of gradients and eigenvectors against dense decompositions."""

import pytest
import torch

from analysis import WeightSpace, top_eigenvalues
from analysis.subspace.leading import leading_factors
from analysis.subspace.overlap import primary_factors, subspace_overlap
from bilora.errors import UserError
from tests.sharpness.cases import bert_objective, normal, randomise_factors, tiny_bert, with_lora


@pytest.fixture(scope="module")
def case():
    model = with_lora(tiny_bert())
    randomise_factors(model, 4)
    full = WeightSpace.full(model)
    return full, primary_factors(full)


def test_they_are_the_truncated_decomposition(case):
    full, primary = case
    gradient = bert_objective().gradient(full)
    for layer, f in leading_factors(gradient, primary).items():
        U, S, Vh = torch.linalg.svd(gradient[f"{layer}.weight"], full_matrices=False)
        rank = primary[layer].A.shape[0]
        torch.testing.assert_close(f.B @ f.A, U[:, :rank] * S[:rank] @ Vh[:rank], rtol=1e-7, atol=1e-12)


def test_overlap_of_the_trained_factors_with_gradient_and_top_eigenvector(case):
    full, primary = case
    objective = bert_objective()
    top = top_eigenvalues(objective, full, 1, tolerance=1e-4, max_products=200, vectors=True).vectors[0]
    for vector in (objective.gradient(full), top):
        result = subspace_overlap(primary, leading_factors(vector, primary, rank=1))
        for found in result.layers:
            M = vector[f"{found.layer}.weight"]
            U, _, Vh = torch.linalg.svd(M, full_matrices=False)
            f = primary[found.layer]
            if found.side == "column":
                direction, basis = U[:, 0], torch.linalg.qr(f.B).Q
            else:
                direction, basis = Vh[0], torch.linalg.qr(f.A.T).Q
            assert found.overlap == pytest.approx(float((basis.T @ direction).square().sum()), rel=1e-6, abs=1e-10)


def test_bad_input_is_one_line(case):
    full, primary = case
    with pytest.raises(UserError, match="take one of the full space of the same adapter"):
        leading_factors({"x.weight": normal(3, 3, seed=0)}, primary)
    with pytest.raises(UserError, match="rank is 0"):
        leading_factors(bert_objective().gradient(full), primary, rank=0)
