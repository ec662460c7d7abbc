"""The training loop and its parts, independent of model families and objectives."""
