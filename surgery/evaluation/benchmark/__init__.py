"""Speed and memory of a converted model compared with its base, interleaved in one run."""
