"""From a model and a batch to the sum of clipped per-unit gradients."""
