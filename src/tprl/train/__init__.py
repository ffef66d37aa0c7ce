"""The stages of TPRL's training, each a linear recipe."""
