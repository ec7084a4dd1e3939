"""."""


def to_markdown(parts):
    return ""
