"""Rollout -> Batch: verify responses, shape rewards, keep the groups that teach something, form advantages."""
