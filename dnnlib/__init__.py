"""Base layer: an attribute dictionary and cached, hash-checked downloads."""

from dnnlib.util import DownloadError, EasyDict, cache_dir, open_url

__all__ = ["DownloadError", "EasyDict", "cache_dir", "open_url"]
