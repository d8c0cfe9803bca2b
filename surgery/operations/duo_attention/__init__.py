"""The head split (DuoAttention): retrieval heads keep the whole past, streaming heads keep sinks and a window.

`operation.py` defines the operation. The scorers of heads are in `operations/head_scorers`.
"""
