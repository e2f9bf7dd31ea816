"""Read by Python at its start, where this folder is in PYTHONPATH: Linux says that it is a Mac."""

import os
import platform
import sys
import sysconfig
import types
from typing import Any


def pretend() -> None:
    """Change what programs ask for."""
    proxies: Any = types.ModuleType("_scproxy")  # which urllib imports on a Mac
    proxies._get_proxies = proxies._get_proxy_settings = dict
    sys.modules["_scproxy"] = proxies
    sys.modules["torch"] = None  # type: ignore[assignment]  # it looks for a .dylib
    sysconfig.get_config_vars()  # read from a file that is named after the platform
    sys.platform = "darwin"
    platform.system = lambda: "Darwin"
    platform.machine = lambda: "arm64"
    platform.mac_ver = lambda *_: ("15.1", ("", "", ""), "arm64")
    del os.sched_getaffinity


if sys.platform == "linux":
    pretend()
