"""The mesh and its sharding rules; a run's processes and their heartbeat."""
