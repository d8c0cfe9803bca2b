"""What a probe gives back: figures with a status, which print, and read like the dict that JSON gets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from surgery.io.printing import Block, Printed


class Result(Printed, Mapping[str, Any]):
    """What `measure` of a probe gives. As a mapping it is `to_dict()`: `result["out"]["perplexity"]`.

    Attributes:
        status: "done", or "not run" for the stated `reason`; then there are no figures.
        notes: what could not be found out.
        PROBE: name of the probe, as in the registry.
    """

    status: str
    reason: str
    notes: list[str]

    PROBE: ClassVar[str] = ""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The record for JSON: what surgery.json keeps, and what the methods of `Probe` that take `record` read."""

    def alone(self) -> str:
        """The figure of a model that was measured without a base, in some words."""
        return "one model"

    def headline(self) -> str:
        from surgery.evaluation.probes import find

        if self.status != "done":
            return f"not run: {self.reason}"
        record = self.to_dict()
        sentence = find(self.PROBE).sentence(record) if self.PROBE and record.get("base") else ""
        return sentence or self.alone()

    def blocks(self) -> list[Block]:
        from surgery.evaluation.probes import find

        if self.status != "done":
            return [f"not run: {self.reason}"]
        lines = find(self.PROBE).lines(self) if self.PROBE else [self.headline()]
        return [*lines, *(f"note: {note}" for note in self.notes)]

    def __getitem__(self, key: str) -> Any:
        return self.to_dict()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict())

    def __len__(self) -> int:
        return len(self.to_dict())
