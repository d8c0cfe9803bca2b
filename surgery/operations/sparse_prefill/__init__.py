"""Sparse prefill: a prompt reads chosen blocks of keys. The estimators are the runtime's (surgery_estimate_*.py).

`operation.py` lists the methods, `base.py` has what they share, `methods.py` the settings of each estimator;
`by_head.py` gives each query head a method of its own, which `pattern_search.py` finds.
"""
