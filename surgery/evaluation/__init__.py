"""Measures what a surgery cost and gained: checks of a folder, probes of a model and its base, benchmarks of speed.

May import report, config, operations, calibration and the packages below.
"""
