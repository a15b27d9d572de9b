"""Files, hub downloads and messages; imports nothing else from this package."""
