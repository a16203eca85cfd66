# SPDX-License-Identifier: Apache-2.0
# Read by the shell scripts that go on in Python (examples/demo, tests/run, tests/bench/run): `need_python NAME CODE`.
# Debian's python3-minimal has an interpreter and the modules that dpkg's scripts need; the scripts here need the rest.
need_python() {
    ! /usr/bin/python3 -c 'import dataclasses, xml.etree.ElementTree' 2>/dev/null || return 0
    if ! command -v apt-get >/dev/null; then
        echo "$1: there is no apt-get here to install Python with; install /usr/bin/python3 with its whole library" >&2
        exit "$2"
    fi
    if [ "$(id -u)" != 0 ]; then
        echo "$1: Python's library is missing; install it as root: apt-get install --no-install-recommends python3" >&2
        exit "$2"
    fi
    echo "$1: installing python3 with apt, 35 MB on disk" >&2
    log=$(mktemp)
    for try in 1 2; do
        if apt-get update -q >"$log" 2>&1 && DEBIAN_FRONTEND=noninteractive apt-get install -y -q \
            --no-install-recommends -o DPkg::Lock::Timeout=600 python3 >>"$log" 2>&1; then
            rm "$log"
            return 0
        fi
    done
    echo "$1: can't install python3; apt-get says: $(tail -n 1 "$log")" >&2
    rm "$log"
    exit "$2"
}
