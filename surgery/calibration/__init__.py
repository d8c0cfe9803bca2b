"""Measuring a model: calibration text now; head scores, sinks and key statistics as operations need them."""
