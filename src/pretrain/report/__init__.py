"""Reports on runs: curves and tables as one self-contained page."""
