"""Measurements: what kernels need and cost on each architecture, found without a GPU, and timings on one."""
