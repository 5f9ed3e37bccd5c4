"""One file per verb: pure functions that return a report."""
