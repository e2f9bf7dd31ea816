"""Runs workloads on several runtimes in turns, so that what disturbs one disturbs all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_openelm.errors import OpenELMError

from .peers import Workload

# Seconds before a trial: thread pools (OpenBLAS, OpenMP, llama.cpp's) go on spinning after their
# work for up to a tenth, and would take the cores from the runtime whose turn it is
SETTLING = 0.1
TIME_LIMIT = 300.0  # seconds for loading, and for one trial


class Worker:
    """A runtime in a process of its own; see `worker`.

    Attributes:
        ready: what it said when the model was loaded: version, load_seconds, peak_bytes, note.
    """

    def __init__(
        self,
        peer: str,
        directory: Path,
        environment: Mapping[str, str] | None = None,
        time_limit: float = TIME_LIMIT,
    ) -> None:
        self.peer, self.time_limit = peer, time_limit
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        # In a session of its own, so that Ctrl-C is for the one who runs the benchmark
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker", peer, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        try:
            self.ready = self._answer(time_limit)
        except BaseException:
            self.close()
            raise

    def run(self, workload: Workload, time_limit: float | None = None) -> dict[str, Any]:
        """The fields of a `Measured`, and `peak_bytes`, resident, and `mlx_peak_bytes`.

        Raises:
            OpenELMError: when the runtime crashes, or takes longer than the time limit.
        """
        time.sleep(SETTLING)
        return self._ask(asdict(workload), time_limit or self.time_limit)

    def graph(self) -> dict[str, Any]:
        """The fields of a `Graph`; empty for a runtime that isn't on MLX.

        Raises:
            OpenELMError: as `run`.
        """
        return self._ask({"graph": True}, self.time_limit)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        with suppress(OSError, ValueError):  # what it wasn't told any more
            self._process.communicate()
        self._errors.close()

    def _ask(self, question: dict[str, Any], time_limit: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it is gone; why, its answer will say
        return self._answer(time_limit)

    def _answer(self, time_limit: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = threading.Timer(time_limit, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
            in_time = timer.is_alive()
        finally:
            timer.cancel()  # after Ctrl-C too: Python waits for its threads before it ends
        if line:
            answer: dict[str, Any] = json.loads(line)
            if "error" in answer:
                raise OpenELMError(f"{self.peer}: {answer['error']}")
            return answer
        if not in_time:
            raise OpenELMError(f"{self.peer}: took longer than {time_limit:.4g} s")
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        raise OpenELMError(f"{self.peer}: {said[-1] if said else 'ended without a word'}")
