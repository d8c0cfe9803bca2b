"""Documents what was done to a model and what it cost: surgery.json, the gate, the model card, plots.

May import operations (for their limitations) and the packages below.
"""
