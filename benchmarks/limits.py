"""A limit of time on one contestant, so that a compiler that searches for minutes does not take the others' turn."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

AGAIN_S = 5.0  # where a library swallowed it


class TooSlow(BaseException):
    """What was running took longer than it may. No ``Exception``: autotuners skip what raises one, and go on."""


@contextlib.contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """Raises ``TooSlow`` within, at the next step of Python, once the seconds are over. In a process's main thread only;
    elsewhere, and with None, there is no limit."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TooSlow(f"stopped after {seconds:.3g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
