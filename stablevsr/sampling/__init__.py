"""The algorithm: schedule, noise, guidance, and the frame-wise bidirectional loop (paper, section 4)."""
