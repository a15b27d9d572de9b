"""BEiT models: trunk, heads and backbone."""
