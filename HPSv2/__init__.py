"""The little of HPSv2 (arXiv 2306.09341) that scoring needs: building the model, reading its weights, preprocessing."""
