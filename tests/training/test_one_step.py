"""Each method against its equations, written with plain tensors on a plain model (no PEFT, no project code)."""

import pytest
import torch
from torch.func import functional_call

from bilora import BiLora, FullFineTuning, Lora, LoraSam
from bilora.methods.bilora import BiLora as _BiLora
from tests.training.tiny import pad, ragged_data, tiny_bert, with_lora

ETA, STEPS, S = 0.1, 4, 2.0
HEAD = ("classifier.weight", "classifier.bias")


class Oracle:
    """Loss and gradients of a plain BERT as a function of factors, by autograd through W0 + Σ s·B·A."""

    def __init__(self, peft_model):
        self.model = tiny_bert()
        self.batch = pad(list(ragged_data()))
        self.layers = [n for n, m in self.model.named_modules() if isinstance(m, torch.nn.Linear) and n != "classifier"]
        self.W0 = {n: self.model.get_parameter(f"{n}.weight").detach() for n in self.layers}
        state = dict(peft_model.named_parameters())
        prefix = "base_model.model."
        self.A = {n: state[f"{prefix}{n}.lora_A.default.weight"].detach().clone() for n in self.layers}
        self.B = {n: state[f"{prefix}{n}.lora_B.default.weight"].detach().clone() for n in self.layers}
        self.head = {h: state[prefix + h.replace("classifier", "classifier.modules_to_save.default")] for h in HEAD}
        self.head = {h: p.detach().clone() for h, p in self.head.items()}

    def gradients(self, A, B, A2=None, B2=None, s2=0.0):
        groups = [A, B, self.head] + ([A2, B2] if A2 else [])
        leaves = [{n: t.clone().requires_grad_() for n, t in g.items()} for g in groups]
        a, b, head = leaves[:3]
        weights = {f"{n}.weight": self.W0[n] + S * b[n] @ a[n] for n in self.layers}
        if A2:
            weights = {f"{n}.weight": weights[f"{n}.weight"] + s2 * leaves[4][n] @ leaves[3][n] for n in self.layers}
        loss = functional_call(self.model, {**weights, **head}, kwargs=self.batch).loss
        flat = torch.autograd.grad(loss, [t for g in leaves for t in g.values()])
        found = iter(flat)
        return [{n: next(found) for n in g} for g in leaves]

    def descend(self, gA, gB, gH):
        self.A = {n: self.A[n] - ETA * gA[n] for n in self.layers}
        self.B = {n: self.B[n] - ETA * gB[n] for n in self.layers}
        self.head = {h: self.head[h] - ETA * gH[h] for h in HEAD}

    def assert_equals(self, model):
        state = dict(model.named_parameters())
        for n in self.layers:
            for letter, expected in (("A", self.A), ("B", self.B)):
                got = state[f"base_model.model.{n}.lora_{letter}.default.weight"]
                torch.testing.assert_close(got.detach(), expected[n], rtol=1e-9, atol=1e-13)
        for h in HEAD:
            got = state["base_model.model." + h.replace("classifier", "classifier.modules_to_save.default")]
            torch.testing.assert_close(got.detach(), self.head[h], rtol=1e-9, atol=1e-13)


def total_norm(*groups):
    return sum((t**2).sum() for g in groups for t in g.values()) ** 0.5


def test_lora(train):
    model = with_lora(tiny_bert())
    oracle = Oracle(model)
    train(model, Lora(), max_steps=STEPS)
    for _ in range(STEPS):
        oracle.descend(*oracle.gradients(oracle.A, oracle.B))
    oracle.assert_equals(model)


@pytest.mark.parametrize("rho", [0.05, 2.0])
def test_lora_sam(train, rho):
    model = with_lora(tiny_bert())
    oracle = Oracle(model)
    train(model, LoraSam(rho=rho), max_steps=STEPS)
    for _ in range(STEPS):
        gA, gB, _ = oracle.gradients(oracle.A, oracle.B)
        F = total_norm(gA, gB)
        A = {n: oracle.A[n] + rho * gA[n] / F for n in oracle.layers}
        B = {n: oracle.B[n] + rho * gB[n] / F for n in oracle.layers}
        oracle.descend(*oracle.gradients(A, B))
    oracle.assert_equals(model)


@pytest.mark.parametrize(
    "options",
    [
        {"rho": 0.005},
        {"rho": 50.0},
        {"rho": 0.005, "clip": "none"},
        {"rho": 0.002, "clip": "layer"},
        {"rho": 0.005, "ascend": False},
        {"rho": 0.005, "norm": "factors", "alpha": 9.0},
        {"rho": 0.005, "learning_rate": 0.3},
    ],
    ids=str,
)
def test_bilora(train, options):
    model = with_lora(tiny_bert())
    oracle = Oracle(model)
    method = BiLora(rank=3, **options)
    trainer = train(model, method, max_steps=STEPS)

    # The auxiliary starts where the method says it starts; everything after is the paper's equations.
    fresh = _BiLora(rank=3, **options)
    start = with_lora(tiny_bert())
    fresh.prepare(start, seed=trainer.args.seed)
    initial = fresh.state_dict()
    A2 = {n: initial[f"auxiliary.{n}.A"] for n in oracle.layers}
    B2 = {n: initial[f"auxiliary.{n}.B"] for n in oracle.layers}
    assert all(not t.any() for t in B2.values())
    s2 = options["alpha"] / 3 if "alpha" in options else S
    eta2 = options.get("learning_rate", ETA) * (1 if options.get("ascend", True) else -1)
    rho = options["rho"]
    weight = s2 if options.get("norm") != "factors" else 1.0
    clipped = False
    for _ in range(STEPS):
        gA, gB, gH, gA2, gB2 = oracle.gradients(oracle.A, oracle.B, A2, B2, s2)
        oracle.descend(gA, gB, gH)
        A2 = {n: A2[n] + eta2 * gA2[n] for n in oracle.layers}
        B2 = {n: B2[n] + eta2 * gB2[n] for n in oracle.layers}
        norms = {n: weight * (B2[n] @ A2[n]).norm() for n in oracle.layers}
        c = sum(v**2 for v in norms.values()) ** 0.5
        for n in oracle.layers:
            over = {"global": c, "layer": norms[n], "none": torch.zeros(())}[options.get("clip", "global")]
            if over > rho:
                clipped = True
                A2[n], B2[n] = A2[n] * (rho / over) ** 0.5, B2[n] * (rho / over) ** 0.5
    oracle.assert_equals(model)
    final = method.state_dict()
    for n in oracle.layers:
        torch.testing.assert_close(final[f"auxiliary.{n}.A"], A2[n], rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(final[f"auxiliary.{n}.B"], B2[n], rtol=1e-9, atol=1e-13)
    assert clipped == (rho < 1 and options.get("clip") != "none"), "the small radii are there to try the clipping"


def test_full(train):
    model, reference = tiny_bert(), tiny_bert()
    train(model, FullFineTuning(), max_steps=STEPS)
    optimizer = torch.optim.SGD(reference.parameters(), lr=ETA)
    for _ in range(STEPS):
        optimizer.zero_grad()
        reference(**pad(list(ragged_data()))).loss.backward()
        optimizer.step()
    for got, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-13)


def test_vanishing_radius_is_plain_lora(train):
    plain, perturbed = with_lora(tiny_bert()), with_lora(tiny_bert())
    train(plain, Lora(), optim="adamw_torch", learning_rate=1e-3)
    train(perturbed, BiLora(rho=1e-12), optim="adamw_torch", learning_rate=1e-3)
    pairs = zip(plain.named_parameters(), perturbed.named_parameters(), strict=True)
    for (name, expected), (other, got) in pairs:
        assert name == other
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
