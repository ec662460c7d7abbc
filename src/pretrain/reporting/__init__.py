"""The parts of a report: the log of a run, read, and curves, drawn."""
