"""Step 0: the log, as columns that every step reads."""
