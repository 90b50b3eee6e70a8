"""Requests that end while other things do: the server, or those who asked."""

import asyncio
import contextlib
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from modeling_fromage.serving.app import Service
from modeling_fromage.serving.errors import ApiError
from modeling_fromage.serving.guard import Gate


def test_the_end_comes_while_a_request_is_over_and_still_ending():
    async def end():
        gate = Gate(0.05, 10)

        async def slow_to_end():
            async with gate.enter():
                try:
                    await asyncio.sleep(10)
                finally:
                    await asyncio.sleep(0.3)

        task = asyncio.create_task(slow_to_end())
        await asyncio.sleep(0.2)
        gate.drain()
        with pytest.raises(ApiError, match="shutting down"):
            await task

    asyncio.run(end())


def test_who_gives_up_leaves_nothing_in_a_queue():
    class Picture:
        pass

    async def give_up(executor):
        picture = Picture()
        kept = weakref.ref(picture)
        task = asyncio.create_task(Service._call(executor, partial(id, picture)))
        await asyncio.sleep(0.1)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        del picture, task
        gc.collect()
        return kept()

    held = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        executor.submit(held.wait)
        try:
            assert asyncio.run(give_up(executor)) is None
        finally:
            held.set()
