"""How good weights, an archive or a server are on labelled pictures."""
