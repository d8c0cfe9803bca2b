"""A look-up of names in a list: what is said of the name that is asked for (`surgery.data.name_list`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from surgery.architecture.anatomy import positions_of
from surgery.calibration.scoring import refuse_other_tokenizer, refuse_too_long
from surgery.data.haystack import FORMS, form_for, refuse_form
from surgery.data.name_list import MOST, make_lookups
from surgery.evaluation.probes.base import Effort, Limit
from surgery.evaluation.probes.fields import check_setting
from surgery.evaluation.probes.recall import ANSWER, RecallProbe, RecallResult, kept_limit
from surgery.evaluation.recall import longest_sequence, reach_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NAME_TOKENS = 18  # of a line of the list, about


@dataclass(repr=False)
class LookupResult(RecallResult):
    """The result of the probe. A needle's depth is the place of the name in the list."""

    PROBE: ClassVar[str] = "lookup"


class Lookup(RecallProbe):
    """A list of names, something said of each, and a question about one of them."""

    name: ClassVar[str] = "lookup"
    summary: ClassVar[str] = "a list of names with a number each: is the right number found"
    stage: ClassVar[str] = "names in a list"
    title: ClassVar[str] = "Names in a list"
    guess: ClassVar[str] = "a guess among the numbers of the list"

    names: int = Field(12, ge=2, le=MOST, description="Names in a list.")
    cases: int = Field(24, ge=1, description="Lists, each with one question.")
    seed: int = Field(0, description="Seed of what is drawn.")
    form: str = Field(
        "auto", description="chat, plain, or auto (by the tokenizer).", json_schema_extra={"enum": list(FORMS)}
    )

    limits: ClassVar[dict[str, Limit]] = {"min_lookup": kept_limit("names", "found", "names kept")}

    @model_validator(mode="after")
    def _refuse_unfit_settings(self) -> Lookup:
        check_setting(refuse_form, self.form)
        return self

    @classmethod
    def what(cls, settings: dict) -> str:
        return f"names found in a list of {settings['names']}"

    @classmethod
    def detail(cls, settings: dict) -> str:
        return f"{settings['names']} with a number each, one asked for"

    @property
    def effort(self) -> Effort:
        length = NAME_TOKENS * self.names
        return Effort(self.cases * length, length)

    def cuts(self, config: PretrainedConfig) -> dict[str, Any]:
        positions = positions_of(config)
        most = ((positions or 0) - ANSWER) // NAME_TOKENS
        return {"names": most} if positions is not None and 2 <= most < self.names else {}

    def make_cases(self, tokenizer: Any, configs: dict[str, Any]) -> LookupResult:
        """The prompts, from `make_lookups`.

        Raises:
            SurgeryError: as for `make_lookups`; prompts exceed a model's positions; the tokenizer is another's.
        """
        settings = {"names": self.names, "seed": self.seed, "form": form_for(tokenizer, self.form)}
        cases = make_lookups(tokenizer, cases=self.cases, **settings)
        refuse_too_long(configs, longest_sequence(cases), "prompt and answer", "fewer names")
        refuse_other_tokenizer(configs, max(token for case in cases for token in (*case.prompt, *case.answer)))
        return LookupResult("done", settings | {"chance": 1 / self.names}, cases, reach=reach_of(configs["out"]))
