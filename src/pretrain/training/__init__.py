"""The one training loop and what it needs; names no model family and no objective."""
