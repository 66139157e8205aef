"""The loop: phases, their steps, their metrics, the trainer."""
