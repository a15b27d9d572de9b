"""Tests against Transformers 4.x, collected only if that version is installed."""

import transformers

collect_ignore_glob = [] if transformers.__version__.startswith("4.") else ["test_*.py"]
