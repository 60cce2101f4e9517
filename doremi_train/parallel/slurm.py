"""Rank of a task of a Slurm step, said in the variables that torch reads; and how a job outlives
its requeue."""

import contextlib
import os
import re
import signal
import socket
import subprocess


def export_ranks() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT where this
    process is one of several tasks of a Slurm step (`srun`), or of a local job of submitit. What is
    set already stays: a launcher such as torchrun has said who is who, and MASTER_ADDR and
    MASTER_PORT are the user's to choose.

    A batch script of eight tasks has SLURM_NTASKS=8 and SLURM_PROCID=0 too, and is one process:
    only a step's tasks have SLURM_STEP_NUM_TASKS. Devices stay as Slurm binds them.
    """
    get = os.environ.get
    if "RANK" in os.environ:
        return
    # Also inside a Slurm job, whose variables it inherits.
    local = get("SUBMITIT_EXECUTOR") == "local"

    def number(ours: str, slurm: str) -> int:
        return int(get(f"SUBMITIT_LOCAL_{ours}" if local else f"SLURM_{slurm}", "0"))

    size = number("NTASKS", "STEP_NUM_TASKS")
    if size < 2:
        return
    local_size = (
        size
        if local
        else _each(os.environ["SLURM_STEP_TASKS_PER_NODE"])[int(os.environ["SLURM_NODEID"])]
    )
    job = 101 * number("JOB_ID", "JOB_ID") + (0 if local else int(os.environ["SLURM_STEP_ID"]))
    os.environ |= {
        "RANK": str(number("GLOBALID", "PROCID")),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(number("LOCALID", "LOCALID")),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": get("MASTER_ADDR") or ("127.0.0.1" if local_size == size else _first_node()),
        # The same on every task, another for every step, and below the ports that systems give out.
        "MASTER_PORT": get("MASTER_PORT") or str(20_000 + job % 12_000),
    }


def outlive_requeue() -> None:
    """Ignore SIGTERM, before a job asks Slurm to requeue it: Slurm then ends every process of the
    job, the `scontrol` that asks among them, which would look as if it had failed: it inherits that
    SIGTERM is ignored. SIGKILL comes later."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _each(compressed: str) -> list[int]:
    """Tasks of each node of a step, from Slurm's short form: 2(x3),1 → [2, 2, 2, 1]."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", compressed)
    return [int(tasks) for tasks, times in parts for _ in range(int(times or 1))]


def _first_node() -> str:
    """The host of rank 0. Where its name does not resolve, the address under which Slurm knows
    it."""
    # The first name: n[03-05,7],m1 → n03.
    name = re.sub(r"\[(\d+)[^\]]*\]", r"\1", os.environ["SLURM_STEP_NODELIST"]).split(",")[0]
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        with contextlib.suppress(OSError):  # no scontrol inside this container
            shown = subprocess.run(
                ["scontrol", "show", "node", name], capture_output=True, text=True, check=False
            )
            match = re.search(r"NodeAddr=(\S+)", shown.stdout)
            return match[1] if match else name
    return name
