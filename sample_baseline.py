"""Sample images with a handcrafted solver: `python sample_baseline.py`, or under `torchrun` on several GPUs."""

from training.commands.sample_baseline import SAMPLERS, SCHEDULE_OPTIONS, VARIANTS, main

__all__ = ["SAMPLERS", "SCHEDULE_OPTIONS", "VARIANTS", "main"]

if __name__ == "__main__":
    main()
