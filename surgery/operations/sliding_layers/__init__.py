"""A window in some of the layers, as a stock model whose cache stops growing there.

`operation.py` has the settings, the methods and the plan. `window_search.py` says what a search for the layers
tries, and `ablation.py` is that search. architecture/sliding.py knows which stock families can hold such layers.
"""
