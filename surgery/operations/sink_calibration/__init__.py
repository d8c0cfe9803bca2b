"""Calibration of attention sinks: the first token's weight (ZeroTuning), other sinks (ACT), virtual keys.

`operation.py` lists the methods, and `base.py` has what they share. The methods in `bias_methods.py` reweight sinks
(`zero_tuning.py` and `act.py` search the weights). The methods in `virtual_key_methods.py` put virtual keys in place
of the first token (`virtual_keys.py` fits them).
"""
