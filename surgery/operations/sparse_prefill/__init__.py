"""Sparse prefill: a prompt reads chosen blocks of keys. The estimators are the runtime's (surgery_estimate_*.py)."""
