"""What devices can do at best, and what a step must compute and read."""
