"""Step 2: an ensemble of Gaussian dynamics models, its uncertainty, and termination."""
