"""Real conda environments without conda's channels: see channel.py."""
