"""The report: rendering, thresholds and the measuring of both sides."""
