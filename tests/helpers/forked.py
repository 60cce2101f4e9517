"""The command in processes that begin at once: forked from a server that has imported torch and the
package already.

Each is a real process with a pid, signals, an environment, a working directory and output of its
own, which runs the command from its first line; importing anew is five of the six seconds that a
small run takes. What a launcher adds is tested in test_launch, test_engines, test_processes and
test_slurm.
"""

import contextlib
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

import pytest

_context = multiprocessing.get_context("forkserver")
_TESTS = str(Path(__file__).parents[1])
_folder = tempfile.TemporaryDirectory(prefix="doremi-forked-")  # of what they print
_context.set_forkserver_preload(
    [
        "doremi_train.stages.pipeline",
        "transformers.models.gpt_neox.modeling_gpt_neox",
        "transformers.models.llama.modeling_llama",
        "matplotlib.backends.backend_svg",
        "scipy.stats",
        "numba",  # where it is installed
        "helpers.heap",
    ]
)


class Forked:
    """What tests use of subprocess.Popen, of one process."""

    def __init__(
        self,
        overrides: Sequence[str],
        env: Mapping[str, str],
        cwd: Path | None,
        files: list[Path],
        before: Callable[[], None],
    ) -> None:
        self.args, self._files = list(overrides), files
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        # Read when a library is loaded, so the server must have it.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", env["OMP_NUM_THREADS"])
            patch.setenv("PYTHONPATH", os.pathsep.join([env["PYTHONPATH"], _TESTS]))
            forkserver.ensure_running()
        self._process = _context.Process(
            target=_run, args=(self.args, dict(env), str(cwd or Path.cwd()), files, limit, before)
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        out, err = (path.read_text() for path in self._files)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None and self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def nothing() -> None:
    """Is done before most commands."""


def ranks(
    count: int,
    overrides: Sequence[str],
    env: Mapping[str, str],
    cwd: Path | None = None,
    before: Callable[[], None] = nothing,
    present: Sequence[int] | None = None,
    port: int | None = None,
) -> list[Forked]:
    """The command as one process, or as `count` that know of each other and that no agent watches;
    they share their output. Only those `present` are started, and meet at `port`; by default all,
    at a free one. `before` is called in each, before the command begins."""
    if count == 1:
        return [Forked(overrides, env, cwd, _outputs(), before)]
    port = port or free_port()
    common = {**env, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    files = _outputs()
    numbers = map(str, range(count) if present is None else present)
    return [
        Forked(overrides, {**common, "RANK": rank, "LOCAL_RANK": rank}, cwd, files, before)
        for rank in numbers
    ]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ended(processes: Sequence[Forked], timeout: float) -> tuple[int, str, str]:
    """Exit code of the first that failed, or 0, and the output of all; none is left."""
    limit = time.monotonic() + timeout
    try:
        for process in processes:
            process.wait(max(limit - time.monotonic(), 0))
    finally:
        for process in processes:
            process.kill()
    return next((code for code in (p.returncode for p in processes) if code), 0), *processes[
        0
    ].communicate()


def _outputs() -> list[Path]:
    """Empty files for stdout and stderr."""
    folder = Path(tempfile.mkdtemp(dir=_folder.name))
    files = [folder / "out", folder / "err"]
    for path in files:
        path.touch()
    return files


def _run(
    overrides: list[str],
    env: dict[str, str],
    cwd: str,
    files: list[Path],
    limit: tuple[int, int],
    before: Callable[[], None],
) -> None:
    """In the new process."""
    for number, path in enumerate(files, 1):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    os.environ.clear()
    os.environ |= env
    os.chdir(cwd)
    before()
    sys.argv = ["doremi-train", *overrides]
    from doremi_train.__main__ import main

    main()
