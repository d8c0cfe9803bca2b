"""Files, folders and the Hub: safetensors, the output folder, loading models, resolve and push, saved partial work.

May import machine, runtime and errors.
"""
