"""Signals that end the process while a verb has something to remove."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
SCRIPT = """
import signal, sys, time
from surgery.cli.interrupt import cleaned_up
if sys.argv[1] == "ignored":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
with cleaned_up():
    try:
        print("begun", flush=True)
        time.sleep(0.5 if sys.argv[1] == "ignored" else 60)
    finally:
        print("removed", flush=True)
print("after")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("handler", ["default", "ignored"])
def test_what_was_begun_is_removed_and_the_signal_ends_the_process(number, handler):
    """`nohup` has SIGHUP ignored, and then it stays so."""
    command = [sys.executable, "-c", SCRIPT, handler]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "begun\n"
        run.send_signal(number)
        said = run.stdout.read().split()
    ignored = handler == "ignored" and number == signal.SIGHUP
    assert said == (["removed", "after"] if ignored else ["removed"])
    assert run.returncode == (0 if ignored else -number)


def test_handlers_stay_as_they_were():
    from surgery.cli.interrupt import cleaned_up

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    with cleaned_up():
        pass
    with pytest.raises(KeyError), cleaned_up():
        raise KeyError
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before
