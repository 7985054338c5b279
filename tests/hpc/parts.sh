# Where the parts of the test cluster are and whether they run; sourced by up and down.
# shellcheck shell=bash disable=SC2034
root=${FTLAUNCH_HPC:-/var/lib/ftlaunch-hpc}
PATH=/usr/sbin:/usr/bin:/sbin:/bin
export SLURM_CONF=$root/etc/slurm.conf
umask 022

die() { echo "tests/hpc: $*" >&2; exit 1; }

[[ $root =~ ^/[A-Za-z0-9/._-]+$ ]] || die "FTLAUNCH_HPC must be an absolute path of letters, digits and /._- : $root"

# The first three digits of the hundred ports that belong to this folder, so that two clusters can run side by side.
ports=$((100 + $(cksum <<<"$root" | cut -d ' ' -f 1) % 49))  # below 15000, where the rendezvous of our jobs begins

# say MESSAGE: progress, to stderr.
say() { echo "tests/hpc: $*" >&2; }

# pid_of PART: its pid, if the process in its pid file is still that program (pids are reused) and no zombie.
pid_of() {
    local pid status
    pid=$(cat "$root/run/$1.pid" 2>/dev/null) && status=$(head -n 3 "/proc/$pid/status" 2>/dev/null) || return 1
    [[ $status == Name:?"${1%%.*}"$'\n'* && $status != *State:?[ZX]* ]] && echo "$pid"
}

# wait_for SECONDS COMMAND...: repeat the command until it succeeds; its last words are left in $answer.
wait_for() {
    local end=$((SECONDS + $1)); shift
    until answer=$("$@" 2>&1 | tail -n 1); do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.2
    done
}

# running_slurmds: the parts that are a slurmd of any configuration.
running_slurmds() {
    local file
    for file in "$root"/run/slurmd.*.pid; do
        [ ! -e "$file" ] || basename "$file" .pid
    done
}

# cancel_jobs: because the processes of a job outlive their slurmd.
cancel_jobs() {
    pid_of slurmctld >/dev/null || return 0
    squeue -h -o %A | sort -u | xargs -r scancel || true
    wait_for 40 eval '[ -z "$(squeue -h)" ]' || say "jobs are still running: $(squeue -h -o %A | tr '\n' ' ')"
}

# stop PART...: TERM to all of them, then wait for each.
stop() {
    local part pid
    for part; do
        if pid=$(pid_of "$part"); then kill "$pid"; fi
    done
    for part; do
        wait_for 60 eval "! pid_of $part" || die "$part (pid $(pid_of "$part")) does not stop; see $root/log"
    done
}
