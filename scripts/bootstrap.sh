# Sourced by scripts/dlopt and scripts/test, with `root` set: makes and refreshes $root/.venv.
#
# .venv/.dlopt holds one line: what the environment was installed from, "<checksum of pyproject.toml>|<root>|<extras>",
# or "unfinished" while it is being made. An unfinished one is made again from nothing, as is one of a checkout that
# moved; one whose pyproject.toml changed is brought up to date in place; one without that line is somebody's own:
# it is installed into, never deleted.

ensure_venv() {  # [test]: with the test tools
    wanted=${1:+,$1}
    venv=$root/.venv
    key="$(cksum <"$root/pyproject.toml")|$root|"
    if venv_is_ready; then return; fi

    find_python
    if ! { mkdir -p "$venv" && touch "$venv/.lock"; } 2>/dev/null; then stop "cannot write to $venv"; fi
    exec 9>>"$venv/.lock"
    if ! lock LOCK_NB; then
        say "waiting for another call that sets up $venv ..."
        lock
    fi
    if ! venv_is_ready; then
        # Without what a cluster's modules put on the path: pip would take it for installed.
        (unset PYTHONPATH PYTHONHOME && build_workload)
    fi
    exec 9>&-  # or the command would hold the lock for as long as it runs
}

say() { printf 'dlopt: %s\n' "$*" >&2; }

stop() {
    say "$*"
    exit 1
}

# The lock belongs to the open file, which this shell and pip share: it is free when the last of them has ended.
# A file system without locks counts as locked.
lock() {  # [LOCK_NB]
    "$python" -c '
import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | sum(getattr(fcntl, flag) for flag in sys.argv[1:]))
except BlockingIOError:
    sys.exit(1)
except OSError:
    pass
' "$@"
}

read_state() {
    state=
    if [ -f "$venv/.dlopt" ]; then IFS= read -r state <"$venv/.dlopt" || :; fi
}

write_state() {
    printf '%s\n' "$1" >"$venv/.dlopt.new"
    mv -f "$venv/.dlopt.new" "$venv/.dlopt"
}

venv_is_ready() {
    read_state
    case $state in
        "$key"*"$wanted") [ -x "$venv/bin/python" ] && [ -x "$venv/bin/dlopt" ] ;;
        *) return 1 ;;
    esac
}

venv_has_pip() { "$venv/bin/python" -m pip --version >/dev/null 2>&1; }

# Sets `python` to the real path of an interpreter of 3.11 or newer. The real path names one version, so that an
# environment made from it is seen to be broken once the system has moved on to the next.
find_python() {
    old=
    set -- python3 python3.14 python3.13 python3.12 python3.11
    if [ -n "${DLOPT_PYTHON:-}" ]; then set -- "$DLOPT_PYTHON"; fi
    for candidate; do
        if python=$("$candidate" -c '
import os, sys
print(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))
sys.exit(sys.version_info < (3, 11))' 2>/dev/null); then return; fi
        if [ -n "$python" ]; then old="$old $python"; fi
    done
    if [ -n "${DLOPT_PYTHON:-}" ]; then
        stop "DLOPT_PYTHON=$DLOPT_PYTHON is not a Python of 3.11 or newer"
    fi
    stop "Python 3.11 or newer is needed${old:+ (too old:$old)}. Debian, Ubuntu: apt install python3 python3-venv." \
        "Where another one is installed: DLOPT_PYTHON=/path/to/python3 scripts/dlopt ..."
}

build_workload() {
    log=$venv/.setup.log
    how=new
    case $state in
        "")
            if [ -e "$venv/pyvenv.cfg" ]; then
                venv_has_pip || stop "$venv was not made by scripts/dlopt and has no working pip: remove it"
                how=own
            fi
            ;;
        *"|$root|"*) if venv_has_pip; then how=update; fi ;;
    esac
    case $state in *,test) wanted=,test ;; esac
    extras=sweep,schedulefree,timm$wanted

    case $how in
        new)
            say "setting up $venv with $python (once: 6 GB, two minutes where the network is fast) ..."
            write_state unfinished
            make_venv
            say "installing PyTorch and the other packages ..."
            ;;
        own)
            say "installing into $venv ..."
            ;;
        update)
            say "bringing $venv up to date ..."
            write_state unfinished
            ;;
    esac
    install_packages
    write_state "$key$extras"
    rm -f "$log"
    say "$venv is ready"
}

make_venv() {
    find "$venv/" -mindepth 1 -maxdepth 1 ! -name .lock ! -name .dlopt -exec rm -rf {} +
    "$python" -m venv "$venv" >"$log" 2>&1 && return
    # Debian keeps ensurepip in the package python3-venv: without it, pip has to come from elsewhere.
    if "$python" -m venv --without-pip "$venv" >>"$log" 2>&1; then
        "$python" -m pip --python "$venv/bin/python" install -q pip >>"$log" 2>&1 && return
        uv pip install -q --python "$venv/bin/python" pip >>"$log" 2>&1 && return
    fi
    "$python" -m virtualenv -q "$venv" >>"$log" 2>&1 && return
    virtualenv -q -p "$python" "$venv" >>"$log" 2>&1 && return
    tail -n 30 "$log" >&2
    stop "$python cannot make an environment with pip in it. Debian, Ubuntu: apt install python3-venv." \
        "Elsewhere: install virtualenv or uv. Then call again."
}

install_packages() {
    # /tmp is often a small disk in memory: PyTorch's wheels would not fit.
    if [ -z "${TMPDIR:-}" ]; then
        export TMPDIR="$venv/.tmp"
        mkdir -p "$TMPDIR"
    fi
    failed=
    PIP_USER=0 "$venv/bin/python" -m pip install -q --disable-pip-version-check -e "${root}[$extras]" \
        >"$log" 2>&1 || failed=yes
    rm -rf "$venv/.tmp"
    if [ -z "$failed" ]; then return; fi
    if [ "$how" = update ]; then write_state "$state"; fi
    if grep -qiE 'NewConnectionError|name resolution|Max retries|timed out|unreachable|ProxyError' "$log"; then
        stop "no network: the package index cannot be reached ($log). It is needed once; pip's settings" \
            "(PIP_INDEX_URL, PIP_PROXY, PIP_FIND_LINKS) are honoured. Then call again."
    fi
    if grep -q 'No space left' "$log"; then
        stop "no space left in $venv or ${TMPDIR}: 6 GB are needed, and as much again for a moment"
    fi
    tail -n 30 "$log" >&2
    stop "pip could not install the packages (above, and in $log). A Python for which there is no PyTorch yet?" \
        "DLOPT_PYTHON=/path/to/python3 chooses another one. Then call again."
}
