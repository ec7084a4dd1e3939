"""Solver tables, denoisers, rewards and the PPO loop that tunes a table."""
