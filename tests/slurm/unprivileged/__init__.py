"""A cluster whose administrator has done nothing: no hooks, stager in a user's home."""
