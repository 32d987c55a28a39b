"""Whether the world is still the one that an archive was evaluated in: its baseline, and drift against it."""
