"""The head split (DuoAttention): retrieval heads keep the whole past, streaming heads keep sinks and a window.

`operation.py` defines the operation. `scorers.py` is the registry of the head scorers; each scorer is one file.
"""
