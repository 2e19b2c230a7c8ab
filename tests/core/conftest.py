"""``untouched``: a watch over everything about a model that a measurement must not change."""

import pytest


def state_of(model):
    """Bits, addresses, flags and gradients of every tensor, and the mode of every module."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        {name: (t.data_ptr(), t.requires_grad, t.dtype, t.detach().clone()) for name, t in tensors.items()},
        {name: (p.grad is None or p.grad.clone()) for name, p in model.named_parameters()},
        {name: (module.training, type(module), getattr(module, "p", None)) for name, module in model.named_modules()},
        model.config.to_dict() if hasattr(model.config, "to_dict") else None,
    )


def same(before, after):
    tensors, gradients, modules, config = before
    for name, (address, grad, dtype, values) in after[0].items():
        old = tensors[name]
        assert (old[0], old[1], old[2]) == (address, grad, dtype), name
        assert (values == old[3]).all(), name
    assert tensors.keys() == after[0].keys()
    for name, gradient in after[1].items():
        assert gradient is gradients[name] if isinstance(gradient, bool) else (gradient == gradients[name]).all()
    assert (modules, config) == after[2:]


@pytest.fixture
def untouched():
    """``untouched(model)`` → a check that the model is bit for bit as it was."""

    def watch(model):
        before = state_of(model)
        return lambda: same(before, state_of(model))

    return watch
