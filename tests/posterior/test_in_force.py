from __future__ import annotations

import asyncio
import threading

from monteclora.posterior import Draw, in_force
from tests.posterior.building import random_posterior


def test_a_block_restores_what_was_before_it_also_after_an_error() -> None:
    posterior = random_posterior()
    one, other = posterior.sample(0, 0), posterior.sample(0, 1)
    with in_force.restored():
        in_force.put(posterior, one)
        try:
            with in_force.restored():
                in_force.put(posterior, other)
                raise ZeroDivisionError
        except ZeroDivisionError:
            assert in_force.draw_of(posterior) is one
    assert in_force.draw_of(posterior) is None


def test_another_thread_is_at_the_mean() -> None:
    posterior, seen = random_posterior(), []
    with in_force.restored():
        in_force.put(posterior, posterior.sample(0, 0))
        thread = threading.Thread(target=lambda: seen.append(in_force.draw_of(posterior)))
        thread.start()
        thread.join()
    assert seen == [None]


def test_tasks_of_one_thread_do_not_meet() -> None:
    posterior = random_posterior()
    draws = [posterior.sample(0, number) for number in range(5)]

    async def use(draw: Draw) -> bool:
        with in_force.restored():
            in_force.put(posterior, draw)
            await asyncio.sleep(0)
            return in_force.draw_of(posterior) is draw

    async def both() -> list[bool]:
        return await asyncio.gather(*map(use, draws))

    assert all(asyncio.run(both()))
    assert in_force.draw_of(posterior) is None
