"""Files that a run writes: its log, its status, its checkpoints, files that resume; local or on an object store."""
