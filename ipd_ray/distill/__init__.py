"""Step 5: the log and the plans, distilled into a causal Transformer whose prompt is the learned value."""
