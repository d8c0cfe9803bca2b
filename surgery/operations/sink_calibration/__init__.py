"""Attention sinks calibrated: the first token's weight (ZeroTuning), other sinks (ACT), virtual keys."""
