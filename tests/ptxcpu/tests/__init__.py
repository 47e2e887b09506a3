"""Tests of ptxcpu itself."""
