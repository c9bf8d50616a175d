# Shared by the scripts, which source it. Finds the repository and installs missing tools.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH=$PATH:$HOME/.cargo/bin
TARGET=target/$(sed -n 's/^target = "\(.*\)"/\1/p' .cargo/config.toml)

say() { printf '\n== %s\n' "$*"; }
fail() { echo "$0: $*" >&2; exit 1; }

# need COMMAND PACKAGE: installs the Debian package if the command is missing.
need() {
    command -v "$1" >/dev/null && return
    command -v apt-get >/dev/null || fail "$1 is missing and apt-get is not here; install $2 by hand"
    { apt-get install -y "$2" || { apt-get update && apt-get install -y "$2"; }; } >/dev/null 2>&1 ||
        fail "$1 is missing and $2 cannot be installed; install it by hand"
}

need_rust() {
    command -v cargo >/dev/null || fail "cargo is missing; install Rust (rustup.rs), 1.89 or newer"
    need cc gcc
    need lscpu util-linux
}

need_mount() {
    [ "$(id -u)" = 0 ] || fail "mounting needs root; run it as root"
    [ -e /dev/fuse ] || modprobe fuse 2>/dev/null || true
    [ -e /dev/fuse ] || mknod /dev/fuse c 10 229
    true <>/dev/fuse || fail "/dev/fuse cannot be opened; load the module fuse, or give the container the device"
}
