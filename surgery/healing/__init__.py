"""Training that recovers the quality a conversion lost, with Transformers' Trainer, peft and accelerate.

`heal.py` is the entry and lists what is checked, in order; `validate.py` has the checks; `run.py` is one training from
data to merged weights. May import evaluation, report, config, operations and the rooms below. Nothing heavy is
imported here.
"""
