"""The command line: one module a group of verbs, `render/` for what they print. The only room with typer and rich."""
