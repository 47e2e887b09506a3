"""Triton kernels of every stage, and the functions that launch them.

Importing a module of this package imports Triton; `mbv2.kernels` does so only when the backend is first considered.
`stages` lists the functions; each one has the name, arguments and results of its plain-torch twin in `kernels/aten.py`.
"""
