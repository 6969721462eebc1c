"""Processes that do one job at a time and may die or hang in it: that job is told of, another process takes the next.

A pool of ``concurrent.futures`` is lost with the first process that aborts, and does not say whose job it was.
"""

import contextlib
import multiprocessing
import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

START_S = 300.0  # a process imports torch before it can take a job


class Lost(Exception):
    """The job's process ended, or was ended for taking too long."""


def _serve(connection: Any, work: Callable) -> None:
    connection.send(None)  # ready
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            connection.send(work(*connection.recv()))


class _Worker:
    """One process, started when there is a job for it and again after it was lost."""

    def __init__(self, work: Callable, seconds: float) -> None:
        self.work, self.seconds = work, seconds
        self.process: Any = None
        self.closed = False

    def _start(self) -> None:
        if self.closed:
            raise Lost("was not begun")
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.work), daemon=True)
        self.process.start()
        theirs.close()  # so that the process's end is the connection's
        try:
            self._receive(START_S, "start")
        except Lost as error:  # no fault of the job's
            raise RuntimeError(f"a process for {self.work.__name__} {error}") from None

    def _receive(self, seconds: float, what: str) -> Any:
        process = self.process
        if not self.connection.poll(seconds):
            self.end()
            raise Lost(f"did not {what} within {seconds:g} s")
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.end()
            process.join()
            raise Lost(f"ended with exit code {process.exitcode}") from None

    def do(self, *job: Any) -> Any:
        if self.process is None or not self.process.is_alive():
            self._start()
        self.connection.send(job)
        return self._receive(self.seconds, "end")

    def end(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()

    def close(self) -> None:
        self.closed = True
        self.end()


class Workers:
    """``count`` processes for ``work(*job)``, at module level; a job may take ``seconds``."""

    def __init__(self, count: int, work: Callable, seconds: float) -> None:
        self._all = [_Worker(work, seconds) for _ in range(count)]
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._all:
            self._free.put(worker)
        self._threads = ThreadPoolExecutor(count)

    def submit(self, *job: Any) -> Future:
        """Its result raises ``Lost`` where the process died or took too long."""
        return self._threads.submit(self._do, *job)

    def _do(self, *job: Any) -> Any:
        worker = self._free.get()
        try:
            return worker.do(*job)
        finally:
            self._free.put(worker)

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._all:
            worker.close()
