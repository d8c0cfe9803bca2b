"""Heads taken away: `importance.py` scores them, `select.py` cuts, `refit.py` refits the output projections."""
