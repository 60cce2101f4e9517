#!/usr/bin/env bash
# A real Slurm of two nodes on this host, for tests: munged, slurmctld and two slurmd, every file of theirs under DIR.
#   tests/helpers/slurm.sh up DIR      start it; then: export SLURM_CONF=DIR/slurm.conf
#   tests/helpers/slurm.sh down DIR    end its jobs and stop exactly what was started
# Needs root and Debian's packages: apt-get install -y --no-install-recommends slurm-wlm munge
set -euo pipefail
PATH=$PATH:/usr/sbin
verb=${1:-}
dir=$(mkdir -p "${2:?usage: slurm.sh up|down DIR}" && cd "$2" && pwd)
export SLURM_CONF=$dir/slurm.conf

alive() { [ -s "$dir/$1.pid" ] && kill -0 "$(cat "$dir/$1.pid" 2>/dev/null)" 2>/dev/null; }

stop() {
    alive "$1" || return 0
    kill "$(cat "$dir/$1.pid")" 2>/dev/null || true
    for _ in {1..100}; do alive "$1" || return 0; sleep 0.1; done
    kill -9 "$(cat "$dir/$1.pid")" 2>/dev/null || true
}

free_ports() {
    python3 - <<'PYTHON'
import socket
sockets = [socket.socket() for _ in range(3)]
for one in sockets:
    one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in sockets))
PYTHON
}

configure() {
    local host ports
    host=$(hostname -s)
    read -ra ports < <(free_ports)
    # cred_expire: a requeued job waits that long for its old credentials. KillWait: seconds from SIGTERM to SIGKILL.
    cat > "$SLURM_CONF" <<CONF
ClusterName=doremi-tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmUser=$(id -un)
StateSaveLocation=$dir/state
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CredType=cred/munge
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmdLogFile=$dir/log/slurmd-%n.log
SlurmdSpoolDir=$dir/spool-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
ReturnToService=2
KillWait=10
MessageTimeout=60
InactiveLimit=0
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[1]} CPUs=4 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[2]} CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
}

up() {
    mkdir -p "$dir"/{state,log,munge,spool-n1,spool-n2}
    [ -s "$SLURM_CONF" ] || configure
    if ! alive munged; then
        chmod 755 "$dir/munge"
        [ -s "$dir/munge/key" ] || head -c 1024 /dev/urandom > "$dir/munge/key"
        chmod 400 "$dir/munge/key"
        munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munged.pid" \
            --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed"
    fi
    alive slurmctld || slurmctld
    for node in n1 n2; do alive "slurmd-$node" || slurmd -N "$node"; done
    for _ in {1..120}; do
        if [ "$(sinfo -h -N -o %T 2>/dev/null | grep -c idle)" = 2 ]; then
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.25
    done
    echo "slurm.sh: the nodes did not come up; the logs end with" >&2
    tail -n 20 "$dir"/log/*.log >&2
    return 1
}

down() {
    if alive slurmctld; then
        scancel --quiet --state=PENDING --user="$(id -un)" || true
        scancel --quiet --user="$(id -un)" || true
        for _ in {1..60}; do [ -z "$(squeue -h 2>/dev/null)" ] && break; sleep 0.25; done
    fi
    for daemon in slurmd-n1 slurmd-n2 slurmctld munged; do stop "$daemon"; done
}

case $verb in
    up | down) "$verb" ;;
    *) echo "usage: slurm.sh up|down DIR" >&2; exit 2 ;;
esac
