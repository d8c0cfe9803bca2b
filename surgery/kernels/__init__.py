"""In a checkout or an editable install: makes the top-level kernels/ folder importable as surgery.kernels.

A built wheel does not contain this file: there, the folder itself is surgery/kernels.
"""

from pathlib import Path as _Path

__path__.append(str(_Path(__file__).resolve().parents[2] / "kernels"))
