"""The command `beit-fast`; `main.main` runs it."""
