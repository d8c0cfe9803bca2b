"""The command line: a module for each group of verbs, and `render/`, which prints. Only it uses typer and rich."""
