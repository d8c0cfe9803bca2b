"""The command `surgery`, and `python -m surgery`."""

from __future__ import annotations


def run() -> None:
    """Run the command; Ctrl-C while its modules are read ends it as quietly as later."""
    try:
        from surgery.cli.main import main
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    main()


if __name__ == "__main__":
    run()
