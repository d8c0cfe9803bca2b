"""Continued training that gives a converted model back what the surgery took: Transformers' Trainer, peft, accelerate.

`heal.py` is the entry, `validate.py` refuses before anything expensive, `run.py` is one training from data to merged
weights. May import evaluation, report, config, operations and the rooms below. Nothing heavy is imported here.
"""
