"""Steps 3 and 4: which states of the log to plan from, MPC inside the world model, and which plans count."""
