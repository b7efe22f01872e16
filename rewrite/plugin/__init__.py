"""What a pass is, what it may answer (edits, conversions), and how it is found and written down."""
