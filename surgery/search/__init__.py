"""Choosing a recipe: trying the values of its settings."""
