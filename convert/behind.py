"""A background thread that hashes and writes blocks while the next one is made."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

WAITING = 4  # calls; what they hold stays in memory


@contextmanager
def behind(limit: int = WAITING) -> Iterator[Callable[[Callable[[], object]], None]]:
    """Yields `submit(call)`: calls run in order on one thread, at most `limit` of them waiting.

    After an error in a call no further call runs; the next `submit`, or the end, raises it.
    """
    failed: list[BaseException] = []
    room = threading.Semaphore(limit)

    def done(future: Future[object]) -> None:
        error = None if future.cancelled() else future.exception()
        if error is not None:
            failed.append(error)
        room.release()

    def run(call: Callable[[], object]) -> object:
        return None if failed else call()

    with ThreadPoolExecutor(1) as pool:

        def submit(call: Callable[[], object]) -> None:
            room.acquire()
            if failed:
                raise failed[0]
            pool.submit(run, call).add_done_callback(done)

        try:
            yield submit
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if failed:
        raise failed[0]
