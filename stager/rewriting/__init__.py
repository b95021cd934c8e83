"""Where the paths of an environment are written down in its files, and their replacement."""
