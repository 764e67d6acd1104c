"""Batches of the texts that concurrent requests wait for."""

from __future__ import annotations

import asyncio
import threading
import time

from gircse.serving import batcher as batcher_module
from gircse.serving.batcher import Batcher


class Model:
    """Stands for one: each row's answer is itself; keeps what it was given. Batches wait while it is `busy`."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[int], int | None]] = []
        self.free = threading.Event()
        self.free.set()

    def __call__(self, rows: list[list[int]], k: int | None) -> list:
        self.free.wait(10)
        self.batches.append(([len(row) for row in rows], k))
        if any(row == [666] for row in rows):
            raise RuntimeError("no")
        return [(row, k) for row in rows]


def test_texts_gather_while_the_model_is_busy():
    model = Model()

    async def ask():
        batcher = Batcher(model, max_tokens=100, wait=0)
        model.free.clear()
        first = asyncio.create_task(batcher.embed([[1]], 5))
        await asyncio.sleep(0.05)
        rest = [asyncio.create_task(batcher.embed([[1] * 5], 5)) for _ in range(7)]
        await asyncio.sleep(0.05)  # one by one, as by a clock of its own, they would be seven batches
        model.free.set()
        return await asyncio.gather(first, *rest)

    assert len(asyncio.run(ask())) == 8
    assert model.batches == [([1], 5), ([5] * 7, 5)]


def test_those_who_were_answered_are_in_the_next_batch_with_those_who_wait():
    model = Model()

    def slow(rows, k):
        time.sleep(0.8)
        return model(rows, k)

    async def ask():
        batcher = Batcher(slow, max_tokens=100, wait=0.001)

        async def client(start):
            await asyncio.sleep(start)
            for _ in range(3):
                await batcher.embed([[1]], 5)
                await asyncio.sleep(0.01)  # longer than `wait`, less than a tenth of a batch

        await asyncio.gather(*map(client, (0, 0, 0.2, 0.2)))

    asyncio.run(ask())
    assert [len(rows) for rows, _ in model.batches] == [2, 4, 4, 2]


def test_a_client_alone_does_not_wait_as_if_there_were_others(monkeypatch):
    monkeypatch.setattr(batcher_module, "WAIT_SHARE", 1)
    monkeypatch.setattr(batcher_module, "MOST_WAIT", 1)

    def slow(rows, k):
        time.sleep(0.5)
        return rows

    async def ask():
        batcher = Batcher(slow, max_tokens=100, wait=0.001)
        started = time.perf_counter()
        for _ in range(4):
            await batcher.embed([[1]], 5)
        return time.perf_counter() - started

    assert 2 <= asyncio.run(ask()) < 2.75  # with the time of three batches more it would be 3.5


def test_batches_keep_to_the_budget_and_the_order():
    model = Model()

    async def ask():
        batcher = Batcher(model, max_tokens=60, wait=0.05)
        lists = [[[1] * 3] * 2, [[2] * 10, [3] * 25], [[4] * 3], [[5] * 200]]
        return await asyncio.gather(*(batcher.embed(rows, k) for rows, k in zip(lists, (5, 5, 7, 5), strict=True)))

    found = asyncio.run(ask())
    assert found == [[([1] * 3, 5)] * 2, [([2] * 10, 5), ([3] * 25, 5)], [([4] * 3, 7)], [([5] * 200, 5)]]
    # Two of 3 + 5 tokens, then 25 + 5 would make 90 with them; k = 7 goes by itself, and 200 tokens exceed the budget.
    assert model.batches == [([3, 3], 5), ([25, 10], 5), ([3], 7), ([200], 5)]


def test_the_oldest_text_is_always_in_the_next_batch():
    model = Model()

    async def ask():
        batcher = Batcher(model, max_tokens=60, wait=0)
        model.free.clear()
        tasks = [asyncio.create_task(batcher.embed([[0]], 5))]
        await asyncio.sleep(0.05)
        # One that fills a batch, among small ones that would fit before it.
        tasks += [asyncio.create_task(batcher.embed([[0] * size], 5)) for size in (2, 50, 3, 4)]
        await asyncio.sleep(0.05)
        model.free.set()
        await asyncio.gather(*tasks)

    asyncio.run(ask())
    assert model.batches == [([1], 5), ([2], 5), ([50], 5), ([3, 4], 5)]


def test_an_error_is_its_batchs_alone_and_cancelled_texts_are_left_out():
    model = Model()

    async def ask():
        batcher = Batcher(model, max_tokens=100, wait=0.05)
        gone = asyncio.create_task(batcher.embed([[1], [2]], 5))
        others = [asyncio.create_task(batcher.embed(rows, k)) for rows, k in (([[3]], 5), ([[666]], 2), ([[4]], 5))]
        await asyncio.sleep(0)
        gone.cancel()
        found = await asyncio.gather(gone, *others, return_exceptions=True)
        return [*found, await batcher.embed([[5]], 5)]

    gone, three, failed, four, after = asyncio.run(ask())
    assert isinstance(gone, asyncio.CancelledError) and isinstance(failed, RuntimeError)
    assert (three, four, after) == ([([3], 5)], [([4], 5)], [([5], 5)])
    assert model.batches == [([1, 1], 5), ([1], 2), ([1], 5)]


def test_the_rest_of_a_list_is_dropped_with_its_first_error():
    model = Model()

    async def ask():
        batcher = Batcher(model, max_tokens=6, wait=0)  # a text a batch
        model.free.clear()
        failing = asyncio.create_task(batcher.embed([[666], [1], [2]], 5))
        await asyncio.sleep(0.05)
        after = asyncio.create_task(batcher.embed([[3]], 5))
        await asyncio.sleep(0.05)
        model.free.set()
        return await asyncio.gather(failing, after, return_exceptions=True)

    failed, after = asyncio.run(ask())
    assert isinstance(failed, RuntimeError) and after == [([3], 5)]
    assert len(model.batches) <= 3  # the second may have begun
