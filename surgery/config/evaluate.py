"""A recipe's `evaluate:` block: the probes that are run on the finished model, and the gate that it must pass."""

from __future__ import annotations

from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    create_model,
    model_serializer,
    model_validator,
)

from surgery.evaluation.probes import REGISTRY, find
from surgery.evaluation.probes import settings as probe_settings
from surgery.evaluation.probes.base import Probe
from surgery.evaluation.probes.fields import settings_error

Blocks: Any = probe_settings.blocks()


class _Text(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    text: str = Field("builtin", description="'builtin' (the held-out part of Python's reference) or a text file.")


_Aliases: Any = create_model("_Aliases", __base__=_Text, **probe_settings.alias_fields())


class Evaluate(_Aliases):
    """What the finished model is judged on, and the gate it must pass."""

    probes: Blocks | None = Field(
        None, description="Probes by name, each with its settings and limits; the keys above are earlier spellings."
    )

    @model_validator(mode="after")
    def _no_setting_twice(self) -> Evaluate:
        named = [name for name, block in (self.probes or ()) if block is not None]
        for key, name in probe_settings.duplicate_keys(self.model_fields_set, named).items():
            block = name.rpartition(".")[0]
            raise settings_error(f"{key} and {block} are two ways to say the same", fix=f"write it as {name}")
        return self

    @model_serializer(mode="wrap")
    def _as_plain_data(self, handler: SerializerFunctionWrapHandler) -> dict:
        return probe_settings.as_data(handler(self), self.probes)

    @property
    def asked(self) -> list[Probe]:
        """The probes that are run, with their settings."""
        return probe_settings.requested_probes(self.model_dump())

    @property
    def main(self) -> Probe:
        """The probe that is always run."""
        return next(probe for probe in self.asked if probe.main)

    @property
    def limits(self) -> dict[str, Any]:
        """The limits of the gate: key -> limit; of some probes a dict of limits by item."""
        return probe_settings.bounds(self.model_dump())


def sections() -> dict[str, list[str]]:
    """Dotted name of each mapping in a recipe's `evaluate:` -> the keys that it may hold."""
    keys = {"evaluate": list(Evaluate.model_fields), "evaluate.probes": list(REGISTRY)}
    return keys | {f"evaluate.probes.{name}": probe_settings.keys(find(name)) for name in REGISTRY}
