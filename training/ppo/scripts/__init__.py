"""Commands that score folders of images and compare the scores."""
