"""Signatures of archives: who built what is served, for as long as the signer says.

    NAME.mar.sig.json   a DSSE envelope    https://github.com/secure-systems-lab/dsse
      payload           an in-toto Statement v1 about the archive's SHA-256, with a predicate of our own
      signature         Ed25519 (RFC 8032) over payload and type; one, by one key

An archive is signed as a whole, so that nothing in it has to be trusted to check it, and is not changed by that: the
signature lies beside it. Trusted keys are PEM files; a key is named by the first 16 digits of the SHA-256 of its DER
form. The serving image checks by its own means, docker/signatures.py.
"""
