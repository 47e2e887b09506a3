"""CUDA C++ kernels: the inverted residual block for inference in one launch (csrc/cuda).

Everything else of the contract comes from the Triton backend, or from plain torch where Triton is not installed.
"""
