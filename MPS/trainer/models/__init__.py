"""The scorer's network, its attention from pictures to prompts, and the reader of its published checkpoint."""
