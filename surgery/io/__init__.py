"""Bytes, folders and the Hub: safetensors headers, the output folder, loading, resolve and push, resumed work.

May import machine, runtime and errors.
"""
