"""The quality protocols: every figure from the ranks of single events, one command a row."""
