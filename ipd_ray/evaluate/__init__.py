"""Step 6: the distilled policy, acting."""
