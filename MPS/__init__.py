"""The little of MPS (arXiv 2405.14705) that scoring needs, in the official repository's layout: `trainer.models`."""
