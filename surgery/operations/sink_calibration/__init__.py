"""Attention sinks calibrated: the first token's weight (ZeroTuning), other sinks (ACT), virtual keys.

`operation.py` lists the methods, `base.py` has what they share. Those of `bias_methods.py` weigh sinks anew
(`zero_tuning.py`, `act.py` search), those of `virtual_key_methods.py` put virtual keys in place of the first token
(`virtual_keys.py` fits them).
"""
