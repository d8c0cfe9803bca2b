"""Removal of heads: `importance.py` scores them, `select.py` cuts, `refit.py` refits the output projections."""
