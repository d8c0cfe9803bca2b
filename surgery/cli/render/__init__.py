"""Output of the command line: trees, maps and tables for people. No logic; every number comes from the API."""
