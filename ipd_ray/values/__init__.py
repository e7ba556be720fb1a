"""Step 1: V, twin Q and a behaviour policy from the log alone (implicit Q-learning)."""
