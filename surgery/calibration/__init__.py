"""Shared tools to measure a model: hooks on attention, layers one at a time, moments, losses, attention sinks.

What belongs to one method stays with the method, in operations/. May import data, architecture and the rooms below.
"""
