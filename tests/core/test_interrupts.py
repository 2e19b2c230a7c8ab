"""Weights come back bit for bit wherever Ctrl+C falls, also on entering and leaving the block."""

import signal
import sys
import threading

import pytest
import torch
from torch import nn

from analysis.core import WeightSpace, gaussian
from analysis.core.half import HalfSpace
from bilora.adapters.interrupts import Exchange
from bilora.adapters.swap import perturbed, swapped
from tests.sharpness.cases import Quadratic, assert_same_bits, quadratic_objective, state


@pytest.fixture(autouse=True)
def own_handler():
    """Python's handler, also where SIGINT is inherited as ignored, as by a job in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted_at(step, block):
    """Send SIGINT before instruction number ``step`` of whatever ``block`` calls; how many there were, and if it rose.

    ``block`` itself is not traced: Python looks at signals between the instructions of a frame, yet not between the
    last one of a ``with`` block and the call of ``__exit__``.
    """
    count = 0

    def tracer(frame, event, argument):
        nonlocal count
        if frame.f_code is block.__code__:
            return None
        frame.f_trace_opcodes = True
        count += 1
        if count == step:
            signal.raise_signal(signal.SIGINT)
        return tracer

    sys.settrace(tracer)
    try:
        block()
    except KeyboardInterrupt:
        return count, True
    finally:
        sys.settrace(None)
        torch.set_grad_enabled(True)
    return count, False


def every_step(block, check):
    """``check()`` after an interrupt at every instruction in turn; every one of them must be seen in the end."""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    step = 1
    while True:
        count, rose = interrupted_at(step, block)
        check()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert rose == (count >= step)
        if count < step:
            return count
        step += 1


def test_swapped_at_every_instruction():
    weights = [nn.Parameter(torch.arange(3.0) + i) for i in range(5)]
    before = [(w.data_ptr(), w.detach().clone()) for w in weights]
    others = {w: torch.full((3,), -1.0) for w in weights}

    def block():
        with swapped(others):
            inside.append(sum(float(w.detach().sum()) for w in weights))

    def check():
        assert [w.data_ptr() for w in weights] == [address for address, _ in before]
        assert all(torch.equal(w, old) for w, (_, old) in zip(weights, before, strict=True))

    inside = []
    assert every_step(block, check) > 100
    assert set(inside) == {-15.0}


def test_a_second_interrupt_while_the_first_is_kept_does_no_harm():
    weight = nn.Parameter(torch.ones(2))

    def twice():
        weight.data = torch.ones(2)
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), Exchange(lambda: None, twice):
        weight.data = torch.zeros(2)
    assert torch.equal(weight, torch.ones(2))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nested_blocks_at_every_instruction():
    weight = nn.Parameter(torch.arange(3.0))

    def block():
        with perturbed({weight: torch.ones(3)}), perturbed({weight: torch.ones(3)}, 2.0):
            assert torch.equal(weight, torch.arange(3.0) + 3)

    def check():
        assert torch.equal(weight, torch.arange(3.0))

    every_step(block, check)


def test_a_space_at_every_instruction():
    space = WeightSpace.all(Quadratic())
    direction, before = gaussian(space, 0, 0), state(space.model)

    def block():
        with space.perturbed(direction, 0.5):
            pass

    assert every_step(block, lambda: assert_same_bits(space.model, before)) > 100


def test_a_half_space_follows_its_masters_after_an_interrupt_at_every_instruction():
    space, (objective, _) = WeightSpace.all(Quadratic()), quadratic_objective()
    half = HalfSpace(space)
    weight, bias = ({name: torch.ones_like(p)} for name, p in space.parameters.items())

    def loss(direction):
        with half.perturbed(direction, 0.5):
            return objective.loss(half)

    expected = loss({})

    def block():
        with half.perturbed(weight, 0.5):
            pass

    def check():
        assert not torch.is_autocast_enabled("cpu")
        assert loss({}) == expected
        loss(bias)  # so that the next time there is something to put back

    loss(bias)
    every_step(block, check)


def test_inside_the_block_an_interrupt_acts_at_once():
    weight = nn.Parameter(torch.zeros(1))
    after = []

    def block():
        with swapped({weight: torch.ones(1)}):
            signal.raise_signal(signal.SIGINT)
            after.append("too late")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert not after
    assert weight.item() == 0


def test_a_handler_of_the_users_own_gets_the_signal_and_stays():
    weight = nn.Parameter(torch.zeros(1))
    seen = []

    def own(number, frame):
        seen.append((number, weight.item()))

    previous = signal.signal(signal.SIGINT, own)
    try:
        with Exchange(lambda: signal.raise_signal(signal.SIGINT), lambda: signal.raise_signal(signal.SIGINT)):
            signal.raise_signal(signal.SIGINT)
        assert [number for number, _ in seen] == [signal.SIGINT] * 3
        assert signal.getsignal(signal.SIGINT) is own
        with swapped({weight: torch.ones(1)}):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        with swapped({weight: torch.ones(1)}):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


def test_what_a_failing_change_has_done_is_undone():
    weight = nn.Parameter(torch.zeros(1))

    def make():
        weight.data = torch.ones(1)
        raise MemoryError

    def undo():
        weight.data = torch.zeros(1)

    with pytest.raises(MemoryError), Exchange(make, undo):
        pass
    assert weight.item() == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_leave_the_handler_alone():
    weight, seen = nn.Parameter(torch.zeros(1)), []

    def work():
        with swapped({weight: torch.ones(1)}):
            seen.append((weight.item(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(1.0, signal.default_int_handler)]
    assert weight.item() == 0
