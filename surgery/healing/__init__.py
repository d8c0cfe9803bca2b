"""Continued training that gives a converted model back what the surgery took: Transformers' Trainer, peft, accelerate.

`heal.py` is the entry and lists what is checked, in order; `validate.py` has the checks; `run.py` is one training from
data to merged weights. May import evaluation, report, config, operations and the rooms below. Nothing heavy is
imported here.
"""
