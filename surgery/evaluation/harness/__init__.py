"""Tasks of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), run on a model, with a score for every item.

lm-eval is the extra `eval`. It is imported in calls alone.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

from surgery.errors import MachineError


def is_installed() -> bool:
    """Whether lm-eval is installed. It is not imported."""
    return importlib.util.find_spec("lm_eval") is not None


def version() -> str:
    """The version of lm-eval.

    Raises:
        MachineError: lm-eval is not installed.
    """
    if not is_installed():
        raise MachineError(
            "lm-eval, which has the tasks, is not installed",
            fix="pip install 'attention-surgery[eval]'",
            code="missing-package",
        )
    return importlib.metadata.version("lm_eval")
