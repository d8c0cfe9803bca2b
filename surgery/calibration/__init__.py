"""Shared tools to measure a model: hooks on attention, layers one at a time, moments, losses, attention sinks.

A tool that only one method uses stays with that method, in operations/. This package may import data, architecture
and the packages below them.
"""
