"""One use of the engine at a time: its cache is the state of one reply."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from toolchain.base.errors import UsageError

Item = TypeVar("Item")


class Gate:
    """Lets one caller in and refuses a second with UsageError; it never waits.

    A generator is in from its first step until it ends, is closed, or is collected.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: Callable[[], Generator[Any, None, None] | None] = lambda: None

    @contextmanager
    def held(self, what: str) -> Iterator[None]:
        """While the body runs, nobody else is let in. ``what`` tells what was refused."""
        if not self._lock.acquire(blocking=False):
            raise UsageError(
                f"{what}: this LLaMa is in the middle of a reply",
                hint="let its generator end, or close() it; for replies side by side load a second LLaMa",
            )
        try:
            yield
        finally:
            self._lock.release()

    def streamed(self, body: Callable[[], Generator[Item, None, None]], what: str) -> Generator[Item, None, None]:
        """The generator that ``body`` makes, in from its first step on."""
        own: list[Callable[[], Generator[Item, None, None] | None]] = []

        def steps() -> Generator[Item, None, None]:
            with self.held(what):
                self._inside = own[0]
                yield from body()

        generator = steps()
        own.append(weakref.ref(generator))  # a strong one would keep a dropped generator alive
        return generator

    def end(self) -> None:
        """Close the generator that is in, if any; UsageError while a step of it is being taken, which may be long."""
        running = self._inside()
        if running is not None:
            try:
                running.close()
            except ValueError as error:  # it is executing: in another thread, or in a function that it calls
                raise UsageError(
                    "this LLaMa is working on a reply at this moment", hint="cancel() it and wait for its end"
                ) from error
