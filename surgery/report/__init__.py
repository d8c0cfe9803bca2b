"""What was done and what it cost: surgery.json, the gate, the model card, plots.

May import operations (for their limitations) and the rooms below.
"""
