"""."""


def save_plot(parts, path):
    pass
