"""Base layer: errors, seeds, process groups, safe files and downloads."""
