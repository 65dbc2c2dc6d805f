"""Per-example gradients of single layers, one file per family of layers."""
