"""In the place of a package that loads frameworks of macOS where `sys.platform` says so."""

from ssl import SSLContext

__all__ = ["SSLContext"]
