"""How files are written and read: durably, whole or not at all, and never as code."""
