"""A trained network into formats that other runtimes read, and a check that what was written computes the same."""

from mbv2.export.command import export

__all__ = ["export"]
