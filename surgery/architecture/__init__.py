"""Where attention is in a model: one row a family, the anatomy of a model, its weights in one canonical form.

`Anatomy.of(model, folder or config)` is what every operation plans with. May import io, machine, runtime, errors.
"""
