"""Removal of heads: `importance.py` scores heads, `select.py` removes them, `refit.py` refits output projections."""
