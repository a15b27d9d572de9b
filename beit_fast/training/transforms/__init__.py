"""Augmentation for training: one image or one batch, all random numbers from one generator."""
