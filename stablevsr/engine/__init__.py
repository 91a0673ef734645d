"""One clip through the whole model: take in, flows, the bidirectional loop, decode; in memory or from file to file."""
