"""Write a cold-start solver table: `network-snapshot-NNNNNN.pkl` and the same values in `training_options.json`."""

from training.commands.fake_train import SCHEDULE_TYPES, main, resolve_rho

__all__ = ["SCHEDULE_TYPES", "main", "resolve_rho"]

if __name__ == "__main__":
    main()
