"""PPO on solver tables: policy, losses, rollouts, rewards and the trainer."""
