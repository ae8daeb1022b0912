"""Reading ahead of a consumer, in order and bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")


def read_ahead(
    read: Callable[[Item], Value], items: Iterable[Item], *, threads: int, depth: int
) -> Iterator[tuple[Item, Value]]:
    """(item, read(item)) for every item, in their order, read by `threads` threads.

    At most `depth` items are being read or wait to be taken, so a fast reader before a slow consumer takes no
    more memory than that. Threads serve, since decoders release the interpreter's lock. An exception of `read`
    comes out at its item's turn. Leaving early drops what was not begun.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ctmasknet-read")
    waiting: deque[tuple[Item, Future[Value]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(read, item)))
            if len(waiting) >= depth:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
