"""The machine and its use: device and memory, threads, speed, progress, Transformers' logging."""
