"""Let llama.cpp print the size of its cache, as a process: `python -P llama_cpp_cache.py FILE.gguf TOKENS`.

The file is run, never imported by the package. The GGUF file is opened with llama.cpp's default settings and a context
of so many tokens. Nothing is computed. The sizes are among what llama.cpp prints to stderr.
"""

import os
import sys

import xllamacpp

if __name__ == "__main__":
    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.n_ctx = int(sys.argv[2])
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.warmup = False
    params.verbosity = 4  # the lowest at which it prints sizes
    server = xllamacpp.Server(params)
    server.handle_metrics()  # when this is answered, it has printed the sizes
    os._exit(0)  # a server that is ended before it listens hangs
