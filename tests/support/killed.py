"""A training that is stopped at a step, as a signal would stop it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from surgery.healing.callbacks import HealCallback


class Killed(BaseException):
    """What stops a run in its process, as a signal would."""


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """The training in this block is stopped before the step of this number, counted from 0; it must come so far."""
    begun = HealCallback.on_step_begin

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise Killed
        return begun(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HealCallback, "on_step_begin", on_step_begin)
        with pytest.raises(Killed):
            yield
