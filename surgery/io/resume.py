"""Figures of a long measurement, kept in a file as they come, so that a run that was stopped goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from surgery.io.files import write_text

SUFFIX = ".state"  # of such files in OUT.partial; they go when OUT is complete


class Found:
    """What was measured so far, by name: one JSON line each.

    Args:
        path: the file; None keeps nothing beyond this object.
        settings: all that the figures depend on, as something whose `repr` says it; a file of other settings is
            started anew.
    """

    def __init__(self, path: Path | None = None, settings: Any = None):
        self.path, self.known = path, {}
        if path is None:
            return
        head = json.dumps({"settings": hashlib.sha256(repr(settings).encode()).hexdigest()})
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        if lines[:1] == [head]:
            for line in lines[1:-1]:  # the last one has no end: empty, or cut off by a kill
                name, value = json.loads(line)
                self.known[name] = value
        write_text(path, "\n".join([head, *map(json.dumps, self.known.items())]) + "\n")

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """A figure, measured if it is not known: numbers, texts and lists of them."""
        if name not in self.known:
            self.known[name] = measure()
            if self.path is not None:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps([name, self.known[name]]) + "\n")
        return self.known[name]
