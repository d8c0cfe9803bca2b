"""Training that recovers the quality a conversion lost, with Transformers' Trainer, peft and accelerate.

`heal.py` is the entry point, and lists all checks in their order. `validate.py` has the checks of settings. `run.py`
is one training from data to merged weights. This package may import evaluation, report, config, operations and the
packages below them. Importing it loads nothing heavy.
"""
