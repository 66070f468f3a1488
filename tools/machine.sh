#!/usr/bin/env bash
# Says in one line what this machine lacks, and how to get it.
#
#   machine.sh build    what building takes: cargo, a C linker, Python 3.11 with venv; installs the last two where it may
#   machine.sh test     what some tests look at others with: installed where it may, and else those tests skip
#   machine.sh demo     what the demo would rather have: it runs without, and says so
#   machine.sh lab-build, lab-run    what building the lab's kernels takes, and booting them; installs it where it may
#   machine.sh python   prints the Python to make .venv with
set -euo pipefail

lacks() {
    echo "latepage: $1" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
        # Debian's python3 has venv without ensurepip until python3-venv is there.
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            echo "$candidate"
            return 0
        fi
    done
    return 1
}

# install NAME...: by apt, as root only; nothing is taken from anywhere else.
install() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
    echo "latepage: installing $*" >&2
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$@"; } >/dev/null
}

build() {
    local advice
    command -v cc >/dev/null || install gcc libc6-dev || lacks "no C linker (cc): install gcc and the C library's headers"
    find_python >/dev/null || install python3 python3-venv || true
    find_python >/dev/null || lacks "no Python 3.11 or later with venv: install python3 and python3-venv, or set PYTHON"
    advice="install Rust 1.88 or later with rustup, and put ~/.cargo/bin on PATH"
    command -v cargo >/dev/null || lacks "no cargo: $advice"
    local minor
    minor=$(cargo --version | sed -n 's/^cargo 1\.\([0-9]*\).*/\1/p')
    [ "${minor:-0}" -ge 88 ] || lacks "$(cargo --version) is too old: $advice"
}

tests() {
    command -v strace >/dev/null || install strace || echo "latepage: no strace: the tests that count system calls skip" >&2
}

demo() {
    [ -r /dev/kvm ] && [ -w /dev/kvm ] || echo "latepage: no access to /dev/kvm: ordinary threads stand in for the guest" >&2
    [ -w /dev/userfaultfd ] || [ "$(id -u)" = 0 ] \
        || [ "$(cat /proc/sys/vm/unprivileged_userfaultfd 2>/dev/null)" = 1 ] \
        || lacks "no access to /dev/userfaultfd: grant it with an ACL (setfacl -m u:$(id -un):rw /dev/userfaultfd), or run as root"
}

# need COMMAND=PACKAGE...: the packages of what is not there, all at once.
need() {
    local pair packages=()
    for pair in "$@"; do
        command -v "${pair%=*}" >/dev/null || [ -e "${pair%=*}" ] || packages+=("${pair#*=}")
    done
    [ ${#packages[@]} = 0 ] || install "${packages[@]}" || lacks "the lab lacks what Debian packages as: ${packages[*]}"
}

lab_build() {
    need /usr/src/linux-source-6.12.tar.xz=linux-source-6.12 gcc=gcc /usr/include/stdlib.h=libc6-dev make=make flex=flex bison=bison \
        bc=bc perl=perl patch=patch xz=xz-utils lz4=lz4 /usr/include/libelf.h=libelf-dev /usr/include/openssl/ssl.h=libssl-dev
}

lab_run() {
    need qemu-system-x86_64=qemu-system-x86 busybox=busybox-static cpio=cpio
}

case "${1:-}" in
    build) build ;;
    test) tests ;;
    demo) demo ;;
    lab-build) lab_build ;;
    lab-run) lab_run ;;
    python) find_python ;;
    *) lacks "machine.sh takes build, test, demo, lab-build, lab-run or python" ;;
esac
