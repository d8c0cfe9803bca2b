"""The result of a probe: figures with a status. It can be printed, and read like the dict that becomes JSON."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from surgery.io.printing import Block, Printed


def without_cases(record: dict[str, Any]) -> dict[str, Any]:
    """A probe's record as surgery.json keeps it: figures, and not the cases with their texts."""
    return {key: value for key, value in record.items() if key != "cases"}


class Result(Printed, Mapping[str, Any]):
    """The result of a probe's `measure`. As a mapping it equals `to_dict()`: `result["out"]["perplexity"]`.

    Attributes:
        status: "done" or "not run". If it was not run, `reason` says why and there are no figures.
        notes: remarks for the reader, such as figures that could not be determined.
        PROBE: name of the probe, as in the registry.
    """

    status: str
    reason: str
    notes: list[str]

    PROBE: ClassVar[str] = ""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The record for JSON. surgery.json keeps it, and the methods of `Probe` that take `record` read it."""

    def alone(self) -> str:
        """A few words with the main figure of a model that was measured without a base."""
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
        probe = find(self.PROBE) if self.PROBE else None
        lines = [*(probe.lines(self) if probe else [self.headline()]), *(f"note: {note}" for note in self.notes)]
        verdict = probe.verdict(self.to_dict()) if probe else ""
        return [*lines, *([verdict] if verdict else [])]

    def __getitem__(self, key: str) -> Any:
        return self.to_dict()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict())

    def __len__(self) -> int:
        return len(self.to_dict())
