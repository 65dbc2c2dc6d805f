"""Measurements on torch models; they observe and never change training."""
