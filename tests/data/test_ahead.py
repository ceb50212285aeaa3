"""What is made in the background comes in order, with its own errors, and no more than may be."""

from __future__ import annotations

import threading

import pytest

from dpldm_dist.data.ahead import Ahead
from dpldm_dist.errors import DataError


def numbers(step: int):
    yield from ((step, place) for place in range(step % 4))


def test_steps_come_whole_and_in_order_whatever_was_made_ahead():
    for most in (1, 2, 100):
        ahead = Ahead(numbers, most=most, last=9)
        for step in (*range(9), 3, 4, 4, 8, 20, 0):
            assert list(ahead.of_step(step)) == list(numbers(step))
        ahead.close()


def test_a_step_that_was_left_in_the_middle_begins_anew():
    ahead = Ahead(numbers, most=2, last=100)
    assert next(ahead.of_step(3)) == (3, 0)
    assert list(ahead.of_step(3)) == list(numbers(3))
    assert next(ahead.of_step(7)) == (7, 0)
    assert list(ahead.of_step(8)) == list(numbers(8))
    ahead.close()


def test_an_error_in_the_background_surfaces_as_itself_where_it_happened():
    trouble = DataError("latents-00003.tar is damaged")

    def make(step: int):
        yield "sound"
        if step == 2:
            raise trouble
        yield "sound"

    ahead = Ahead(make, most=50, last=100)
    assert list(ahead.of_step(0)) == list(ahead.of_step(1)) == ["sound", "sound"]
    items = ahead.of_step(2)
    assert next(items) == "sound"
    with pytest.raises(DataError) as caught:
        next(items)
    assert caught.value is trouble
    with pytest.raises(DataError):  # and again when it is asked again
        list(ahead.of_step(2))
    ahead.close()


def test_no_more_is_made_than_may_be_and_nothing_after_the_last_step_or_the_end():
    made, enough = [], threading.Event()

    def make(step: int):
        for place in range(4):
            made.append((step, place))
            if len(made) == 4:
                enough.set()
            yield place

    ahead = Ahead(make, most=3, last=2)
    items = ahead.of_step(0)
    assert next(items) == 0
    assert enough.wait(10) and len(made) <= 1 + 3 + 1  # taken, waiting, and one in the hand
    assert [*items, *ahead.of_step(1)] == [1, 2, 3, 0, 1, 2, 3]
    assert len(made) == 8
    ahead.close()
    assert not any(thread.name.endswith("(_work)") for thread in threading.enumerate())
