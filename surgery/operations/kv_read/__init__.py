"""Decoding steps that read a part of the cache, which stays whole.

`base.py` has the fields that all readers share and the plan, `methods.py` a class for each reader with its own fields,
`key_directions.py` the directions in which `loki` ranks keys, and `operation.py` lists the readers. The rules
themselves run in the checkpoint: `surgery/runtime/surgery_kv_read_*.py`.
"""
