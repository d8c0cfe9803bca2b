"""Where attention is in a model: a table of families, the anatomy of a model, and its weights in one canonical form.

Every operation plans with `Anatomy.of(model, folder or config)`. May import io, machine, runtime, errors.
"""
