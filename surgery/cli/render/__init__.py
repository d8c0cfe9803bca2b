"""What the command line prints: trees, maps and tables for people. No logic; every number comes from the API."""
