"""Measuring a model: calibration text, and a score for every KV head by one of several methods."""
