"""The stages on a CPU as compiled kernels (csrc/cpu/train_*): `stages` lists them, named as their plain-torch twins."""
