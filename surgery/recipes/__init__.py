"""In a checkout or an editable install: makes the top-level recipes/ folder readable as surgery.recipes.

A built wheel does not contain this file: there, the folder itself is surgery/recipes.
"""

from pathlib import Path as _Path

__path__.append(str(_Path(__file__).resolve().parents[2] / "recipes"))
