"""Pieces of work on the threads that torch has."""

import pytest
import torch

from surgery.side_by_side import side_by_side

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_pieces_come_in_their_order_whoever_works_on_them(threads):
    seen, parameter = set(), torch.nn.Parameter(torch.ones(2))

    def work(number, word):
        seen.add(torch.get_num_threads())
        return f"{number} {word}", (parameter * number).requires_grad

    found = list(side_by_side(work, range(7), "abcdefg", device=CPU))
    assert found == [(f"{n} {word}", False) for n, word in enumerate("abcdefg")]
    assert seen == {1}
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def test_an_error_comes_out_and_the_threads_are_there_again(threads):
    def work(number):
        if number == 3:
            raise ValueError("the fourth")
        return number

    each = side_by_side(work, range(6), device=CPU)
    assert [next(each) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="the fourth"):
        next(each)
    assert torch.get_num_threads() == threads


def test_who_leaves_early_has_the_threads_again(threads):
    each = side_by_side(lambda number: number, range(50), device=CPU)
    assert next(each) == 0
    each.close()
    assert torch.get_num_threads() == threads


def test_one_piece_may_use_all_threads(threads):
    assert list(side_by_side(lambda _: torch.get_num_threads(), [0], device=CPU)) == [threads]
