"""MobileNetV2 for PyTorch."""
