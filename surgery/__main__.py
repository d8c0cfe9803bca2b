"""The command `surgery`, and `python -m surgery`."""

from __future__ import annotations

import gc
import sys


def run() -> None:
    """Run the command; Ctrl-C while its modules are read ends it as quietly as later."""
    try:
        from surgery.cli.main import main
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    try:
        main()
    finally:
        if "triton" not in sys.modules:  # whose bindings would report all that is left as leaked
            gc.freeze()  # or Python would look for garbage among all that torch made, for half a second


if __name__ == "__main__":
    run()
