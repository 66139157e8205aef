"""Reinforcement learning of reasoning language models in JAX, with policy reheating (TS-OPSD)."""
