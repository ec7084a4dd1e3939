"""One file per reward model besides HPSv2."""
