"""The torchdyn host, which waits for the user's import of torchdyn.

What it knows of torchdyn's internals (checked against 1.0.6): `_field` its wrappers of func and its
models' attributes, `_methods` its dict of methods, its loops and adjoints, which are replaced, and
`_stepper` its solver objects and adjoint splines. Nothing outside this folder knows any.
"""
