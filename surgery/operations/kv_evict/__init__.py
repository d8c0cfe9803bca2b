"""KV eviction: KV heads keep a fixed number of keys, whatever the length of the text; with `task_kv`, some keep all.

`base.py` has the fields that all policies share and the plan, `methods.py` a class for each policy with its own
fields, and `operation.py` lists them. The rules themselves run in the checkpoint: `surgery/runtime/surgery_kv_*.py`.
"""
