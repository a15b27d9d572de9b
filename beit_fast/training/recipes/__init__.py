"""Recipes: pre-training, fine-tuning and evaluation."""
