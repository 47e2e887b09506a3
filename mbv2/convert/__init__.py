"""Weights of other libraries and formats into ours: each reader gives one description, `network.Network`."""

from mbv2.convert.command import convert
from mbv2.convert.detect import read_network

__all__ = ["convert", "read_network"]
