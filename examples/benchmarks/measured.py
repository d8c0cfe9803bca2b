"""The figures that a script has measured, kept in a file so that the same command resumes; the scripts share this."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Measured(dict[str, Any]):
    """Name -> figures, as plain JSON data.

    Args:
        path: the JSON file; None keeps nothing.
        settings: everything that the figures depend on.

    Raises:
        SystemExit: the file holds figures of other settings, or there is no folder for it.
    """

    def __init__(self, path: Path | None, settings: dict):
        super().__init__()
        self.path, self.settings = path, json.loads(json.dumps(settings, default=str))
        if path is None:
            return
        if not path.parent.is_dir():
            raise SystemExit(f"there is no folder {path.parent} to write {path.name} to")
        if path.is_file():
            known = json.loads(path.read_text(encoding="utf-8"))
            if "measured" not in known:
                raise SystemExit(f"{path} is not of this version: name another --out to begin again")
            if (old := known["settings"]) != self.settings:
                names = [name for name in {**old, **self.settings} if old.get(name) != self.settings.get(name)]
                raise SystemExit(
                    f"{path} is of other settings ({', '.join(names)}): name another --out to begin again"
                )
            self.update(known["measured"])

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """The figures of that name; they are measured and kept if they are not known yet."""
        if name not in self:
            self[name] = json.loads(json.dumps(measure()))
            self.keep()
        return self[name]

    def keep(self) -> None:
        """Write all figures to the file."""
        if self.path is not None:
            unfinished = self.path.with_name(f".{self.path.name}")
            text = json.dumps({"settings": self.settings, "measured": self}, indent=1)
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, self.path)
