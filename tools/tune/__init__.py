"""The setting that serves a recipe fastest on this machine, found by trying on a real server."""
