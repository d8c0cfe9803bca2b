"""The head split (DuoAttention): retrieval heads keep the whole past, streaming heads sinks and a window.

`operation.py` is the recipe's entry; `scorers.py` is the registry of the ways to score heads, one file each.
"""
