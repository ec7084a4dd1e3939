"""The commands whose scripts lie in the root folder: `python sample.py` and `epd-sample` are the same."""
