"""Pieces of work on the threads that torch has."""

import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait

import pytest
import torch

from surgery.machine.parallel import OrderedSection, check_cancelled, parallel_map

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_pieces_come_in_their_order_whoever_works_on_them(threads):
    workers, parameter = set(), torch.nn.Parameter(torch.ones(2))

    def work(index, word):
        workers.add(torch.get_num_threads())
        return f"{index} {word}", (parameter * index).requires_grad

    results = list(parallel_map(work, range(7), "abcdefg", device=CPU))
    assert results == [(f"{n} {word}", False) for n, word in enumerate("abcdefg")]
    assert workers == {1}
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def test_an_error_comes_out_and_the_threads_are_there_again(threads):
    def work(index):
        if index == 3:
            raise ValueError("the fourth")
        return index

    each = parallel_map(work, range(6), device=CPU)
    assert [next(each) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="the fourth"):
        next(each)
    assert torch.get_num_threads() == threads


def test_who_leaves_early_has_the_threads_again(threads):
    each = parallel_map(lambda index: index, range(50), device=CPU)
    assert next(each) == 0
    each.close()
    assert torch.get_num_threads() == threads


def test_one_piece_may_use_all_threads(threads):
    assert list(parallel_map(lambda _: torch.get_num_threads(), [0], device=CPU)) == [threads]


def test_pieces_share_the_threads_and_may_divide_their_share():
    before = torch.get_num_threads()

    def work(index):
        inner = parallel_map(lambda letter: (letter, torch.get_num_threads()), "abc", device=CPU)
        return torch.get_num_threads(), list(inner), torch.get_num_threads()

    try:
        torch.set_num_threads(4)
        results = list(parallel_map(work, range(3), device=CPU, at_once=2))
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert results == [(2, [("a", 1), ("b", 1), ("c", 1)], 2)] * 3


def test_long_work_ends_where_nobody_waits_for_it(threads):
    started, ended = threading.Event(), threading.Event()

    def work(index):
        if index == 0:
            assert threads == 1 or started.wait(60)
            raise KeyboardInterrupt
        started.set()
        try:
            for _ in range(3000):  # half a minute
                check_cancelled()
                time.sleep(0.01)
        except CancelledError:
            ended.set()
            raise

    with pytest.raises(KeyboardInterrupt):
        list(parallel_map(work, range(2), device=CPU))
    assert threads == 1 or ended.is_set()  # before the error comes out
    check_cancelled()  # who asked for it goes on


def test_a_second_interrupt_waits_for_the_work_too(monkeypatch):
    """The second one comes while the first one waits: work has ended, and other threads begin with all of them."""
    before, started, ended, waited = torch.get_num_threads(), threading.Event(), threading.Event(), []

    def work(index):
        if index == 0:
            assert started.wait(60)
            raise KeyboardInterrupt
        started.set()
        try:
            for _ in range(3000):
                check_cancelled()
                time.sleep(0.01)
        finally:
            ended.set()

    def interrupted(futures):
        waited.append(len(futures))
        if len(waited) == 1:
            raise KeyboardInterrupt("again")
        return wait(futures)

    monkeypatch.setattr("surgery.machine.parallel.wait", interrupted)
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt, match="again"):
            list(parallel_map(work, range(2), device=CPU))
        assert ended.is_set()
        assert len(waited) == 2
        with ThreadPoolExecutor(1) as fresh:
            assert fresh.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)


def test_turns_are_taken_in_order_whoever_is_first(threads):
    section, order = OrderedSection(), []

    def work(index):
        time.sleep(0.02 * (index % 2 == 0))  # the second of two is ready first
        with section.of(index):
            order.append(index)

    list(parallel_map(work, range(6), device=CPU, at_once=2))
    assert order == list(range(6))


def test_who_waits_for_a_turn_that_an_error_ended_ends_too(threads):
    section = OrderedSection()

    def work(index):
        with section.of(index):
            raise ValueError(f"piece {index}")

    with pytest.raises(ValueError, match="piece 0"):
        list(parallel_map(work, range(4), device=CPU, at_once=2))
