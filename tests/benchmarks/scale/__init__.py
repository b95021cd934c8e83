"""Starts of one to 9,408 nodes: measured on the test cluster, then simulated and computed."""
