"""The command line: one function for each command, and how its words become settings."""
