"""Which KV heads need the far past: scorers that measure it, and the choice of the heads that do without.

`scorers.py` is the registry of the scorers; each scorer is one file. `choice.py` is what the operations share that
choose heads by their scores: the head split (`duo_attention`) and KV eviction (`kv_evict`).
"""
