"""What a user writes, as pydantic models: recipes, the `heal:` block, key=value overrides, YAML with line numbers.

Every error names file, line and the nearest key. May import operations (for their fields) and the packages below.
"""
