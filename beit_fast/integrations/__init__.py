"""Other libraries' BEiT made fast: a module for each, imported by name; nothing else in the package imports them."""
