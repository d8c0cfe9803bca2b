"""Plan a conversion and carry it out: on a model in memory, on a loaded folder, or streamed one layer at a time.

May import healing (a plan says what will train), evaluation, report, config, operations and the packages below.
"""
