"""A few questions to a running server."""
