"""What this machine has and how it is used: device and memory, threads, progress, the logging of Transformers."""
