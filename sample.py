"""Sample images with a solver table: `python sample.py`, or `torchrun ... sample.py` on several GPUs."""

from training.commands.sample import main

if __name__ == "__main__":
    main()
