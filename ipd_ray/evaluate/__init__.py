"""Steps 6 and 7: the distilled policy, acting."""
