"""Sparse prefill: a prompt reads chosen blocks of keys. The runtime has the estimators (surgery_estimate_*.py).

`operation.py` lists the methods, `base.py` has what they share, and `methods.py` has the settings of each estimator.
`by_head.py` gives each query head its own method, which `pattern_search.py` finds.
"""
