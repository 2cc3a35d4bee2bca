"""Work shared out to processes: results come in the order of the work, and little of it waits at any time."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from ..errors import ConfigError

Work = TypeVar("Work")
Result = TypeVar("Result")
AHEAD = 2  # pieces of work for each process that may be done before an earlier one is


class Workers(Generic[Work, Result]):
    """Processes that each hold a function of one piece of work. They end with this one, whatever ends it."""

    def __init__(self, jobs: int, make: Callable[[], Callable[[Work], Result]]) -> None:
        """`make` is called once in each process; what goes to and fro must be picklable."""
        context = multiprocessing.get_context("spawn")
        self.jobs = jobs
        self.processes: list[BaseProcess] = []
        self.pipes: list[Any] = []
        for _ in range(jobs):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(make, there), daemon=True)
            process.start()
            there.close()  # so that the process is the only one at its end, and either notices when the other ends
            self.processes.append(process)
            self.pipes.append(here)

    def map(self, pieces: Iterator[Work]) -> Iterator[Result]:
        """The result of each piece, in their order. Raises ConfigError if a process ends by itself."""
        idle = deque(self.pipes)
        running: dict[Any, int] = {}
        done: dict[int, Result] = {}
        begun = given = 0
        ready = list(islice(pieces, 1))
        while True:
            while ready and idle and begun - given < AHEAD * self.jobs:
                with self._watch():
                    idle[0].send(ready.pop())
                running[idle.popleft()] = begun
                begun += 1
                ready = list(islice(pieces, 1))
            if given in done:
                yield done.pop(given)
                given += 1
            elif running:
                pipe: Any
                for pipe in wait(list(running)):
                    with self._watch():
                        done[running.pop(pipe)] = pipe.recv()
                    idle.append(pipe)
            else:
                return

    @contextmanager
    def _watch(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):
            raise ConfigError(
                f"--jobs {self.jobs}: a process ended by itself; the same command goes on where it was, with fewer "
                "--jobs if memory ran out (a Python script must call it below `if __name__ == '__main__':`)"
            ) from None

    def close(self) -> None:
        """End the processes, whatever they are at."""
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.close()
            process.terminate()
        for process in self.processes:
            process.join()


def _serve(make: Callable[[], Callable[[Work], Result]], pipe: Any) -> None:
    """What a process does: work until the other end of its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends this one in order
    work = make()
    try:
        while True:
            pipe.send(work(pipe.recv()))
    except (EOFError, OSError):
        pass
