"""Transformers without its progress bars and warnings: they would end up in pipes and in the output of `--json`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back transformers' progress bars and warnings inside the `with`; errors still show."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def quiet_in_pipes() -> contextlib.AbstractContextManager[None]:
    """`quiet_transformers`, except on a terminal, where a person sees by the bar that work goes on."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    return contextlib.nullcontext() if terminal else quiet_transformers()
