"""Many trials of one batch size trained as one stacked model."""
