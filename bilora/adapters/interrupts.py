"""Blocks that undo what they have changed, whenever Ctrl+C comes.

Python raises ``KeyboardInterrupt`` between any two instructions of the main thread, also while a ``with`` block is
being entered or left: then ``__exit__`` is not called, or stops half-way. Here a SIGINT that arrives in either waits
until it has ended. Inside the block, and everywhere else, it acts at once.
"""

import signal
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]


class Exchange:
    """``make()`` on entering the block, ``undo()`` on leaving it, neither of them cut short by SIGINT.

    The handler that was there is put back afterwards; it gets a SIGINT that had to wait. Where there is no Python
    handler, or in another thread than the main one, no signal can interrupt and nothing is installed.

    Args:
        make: the change.
        undo: puts back what was; also called where ``make`` raised, so it must not depend on how far that came.
    """

    def __init__(self, make: Callable[[], None], undo: Callable[[], None]) -> None:
        self._make = make
        self._undo = undo
        self._installed = False

    def __enter__(self) -> None:
        self._installed = _interrupts.install()
        try:
            self._make()
            _interrupts.deliver()
        except BaseException:
            self._leave()
            raise

    def __exit__(self, *_: object) -> None:
        self._leave()
        _interrupts.deliver()

    def _leave(self) -> None:
        try:
            self._undo()
        finally:
            if self._installed:
                _interrupts.uninstall()


class _Interrupts:
    """The process's one handler that lets SIGINT wait; only the main thread reads or writes its state."""

    _SHIELDED: frozenset[CodeType] = frozenset({Exchange.__enter__.__code__, Exchange.__exit__.__code__})

    def __init__(self) -> None:
        self._handler: Handler = self._handle  # one object, to be known by identity
        self._previous: Handler = signal.default_int_handler
        self._waiting = False

    def install(self) -> bool:
        """Whether this call installed the handler, so that its caller has to uninstall it."""
        if threading.current_thread() is not threading.main_thread():
            return False
        previous = signal.getsignal(signal.SIGINT)
        if previous is self._handler or not callable(previous):
            return False
        self._previous, self._waiting = previous, False
        signal.signal(signal.SIGINT, self._handler)
        return True

    def uninstall(self) -> None:
        """Put the earlier handler back, unless the block has chosen another one."""
        if signal.getsignal(signal.SIGINT) is self._handler:
            signal.signal(signal.SIGINT, self._previous)

    def deliver(self) -> None:
        """Give the earlier handler the SIGINT that waited, if one did."""
        if self._waiting and threading.current_thread() is threading.main_thread():
            self._waiting = False
            self._previous(signal.SIGINT, None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        caller = frame
        while caller is not None:
            if caller.f_code in self._SHIELDED:
                self._waiting = True
                return
            caller = caller.f_back
        self._previous(number, frame)


_interrupts = _Interrupts()
