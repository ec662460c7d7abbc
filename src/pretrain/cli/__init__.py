"""The command line: one function per command, and the parsing of arguments into settings."""
