"""A clip through the whole model: ingest, flows, the bidirectional loop, decode; in memory or from file to file."""
