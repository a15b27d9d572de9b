"""Files, hub downloads, messages and names of options; imports nothing else from this package."""
