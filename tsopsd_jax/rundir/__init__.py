"""What a run writes: its log, its checkpoints, files that resume; local or on an object store."""
