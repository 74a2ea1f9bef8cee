"""Flax linen models: a shared dilated ResNet and one head for each task."""
