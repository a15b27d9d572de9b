"""The command `beit-fast predict`."""
