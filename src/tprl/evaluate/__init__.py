"""What pruning costs and what it saves: accuracy, FLOPs, milliseconds."""
