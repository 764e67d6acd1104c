"""Batches of the texts that concurrent requests wait for.

While a batch is in the model, texts gather; then those that wait longest go, as many as a batch may have. Ray's
`serve.batch` would cut batches by the clock, also while the model is busy: of texts that come one by one it makes small
batches that queue one behind the other, unless each request waits about as long as the model takes for one. It may also
put a long text behind newer ones each time that it doesn't fit.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from handler import most_rows

WAIT_SHARE, MOST_WAIT = 0.1, 0.1
CHECKS = 10  # during a wait, of whether it can end


@dataclass
class Row:
    """A text on its way: its tokens, the k that it is embedded with (None where nothing is generated), and where the
    result goes."""

    ids: list[int]
    k: int | None
    result: asyncio.Future


class Batcher:
    """Runs rows in batches, one after the other in a thread.

    Args:
        run: embeds rows of one k; returns one result for each.
        max_tokens: of a batch: its rows times the longest of them, generated tokens included.
        wait: seconds that a batch with room left waits for more rows; 0 for none. Then, while fewer rows wait than the
            last batch had or left behind, it waits for up to [`WAIT_SHARE`] of the time that the last batch took,
            [`MOST_WAIT`] seconds at most: clients that were just answered send their next texts, which would otherwise
            make a batch of their own each time.
    """

    def __init__(self, run: Callable[[list[list[int]], int | None], Sequence[Any]], max_tokens: int, wait: float):
        self.run, self.max_tokens, self.wait = run, max_tokens, wait
        self.took = 0.0  # seconds of the last batch
        self.expected = 0  # its rows and those that waited when it ended
        self.waiting: deque[Row] = deque()
        # One thread for all batches: torch would start other threads of its own for each new one.
        self.thread = ThreadPoolExecutor(1)
        self.task: asyncio.Task | None = None

    async def embed(self, rows: Sequence[list[int]], k: int | None) -> list[Any]:
        """The results, in the order of `rows`, lists of tokens.

        Raises:
            Exception: what `run` raises, for all rows of its batch.
        """
        loop = asyncio.get_running_loop()
        made = [Row(ids, k, loop.create_future()) for ids in rows]
        # The longest first, so that the batches of a long list have little padding.
        self.waiting.extend(sorted(made, key=lambda row: len(row.ids), reverse=True))
        if self.task is None or self.task.done():
            self.task = loop.create_task(self._work())
        try:
            return await asyncio.gather(*(row.result for row in made))
        finally:  # where one failed, or the request was cancelled, nobody wants the others
            for row in made:
                row.result.cancel()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self.waiting:
            if self.wait:
                await self._gather()
            batch = self.take()
            if not batch:
                continue
            started = loop.time()
            try:
                results = await loop.run_in_executor(self.thread, self.run, [row.ids for row in batch], batch[0].k)
            except Exception as error:
                for row in batch:
                    if not row.result.done():
                        row.result.set_exception(error)
            else:
                for row, result in zip(batch, results, strict=True):
                    if not row.result.done():
                        row.result.set_result(result)
            self.took, self.expected = loop.time() - started, len(batch) + len(self.waiting)

    async def _gather(self) -> None:
        if not self._is_full():
            await asyncio.sleep(self.wait)
        for _ in range(CHECKS):
            if self._is_full() or len(self.waiting) >= self.expected:
                break
            await asyncio.sleep(min(WAIT_SHARE * self.took, MOST_WAIT) / CHECKS)

    def _is_full(self) -> bool:
        first = self.waiting[0]
        return len(self.waiting) >= most_rows(len(first.ids), first.k or 1, self.max_tokens)

    def take(self) -> list[Row]:
        """The next batch: the row that waits longest and those after it of its k, up to the first that doesn't fit."""
        batch: list[Row] = []
        left: deque[Row] = deque()
        longest = 0
        while self.waiting:
            row = self.waiting.popleft()
            if row.result.done():  # nobody waits for it any more
                continue
            if batch and row.k != batch[0].k:
                left.append(row)
                continue
            longest = max(longest, len(row.ids))
            if len(batch) >= most_rows(longest, row.k or 1, self.max_tokens):
                left.append(row)
                break
            batch.append(row)
        self.waiting.extendleft(reversed(left))
        return batch
