# Shared by the scripts, which source it. Finds the repository, installs missing tools, and sets how kcm is built.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH=$PATH:$HOME/.cargo/bin

say() { printf '\n== %s\n' "$*"; }
fail() { echo "$0: $*" >&2; exit 1; }

# need COMMAND PACKAGE [OPTION...]: installs the Debian package, with options of apt-get, if the command is missing.
need() {
    local command=$1 package=$2
    shift
    command -v "$command" >/dev/null && return
    command -v apt-get >/dev/null || fail "$command is missing and apt-get is not here; install $package by hand"
    { apt-get install -y "$@" || { apt-get update && apt-get install -y "$@"; }; } >/dev/null 2>&1 ||
        fail "$command is missing and $package cannot be installed; install it by hand"
}

# All scripts build with the same settings, so that nothing is built twice: for the architecture of this machine (or
# $CARGO_BUILD_TARGET), and statically linked. Naming a target keeps build scripts and procedural macros dynamic; they
# do not work as static programs. A plain `cargo build` uses neither setting and has its own directory below target/.
need_rust() {
    local least has
    least=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    if ! command -v cargo >/dev/null || ! command -v rustc >/dev/null; then
        fail "cargo or rustc is missing; install Rust $least or newer (rustup.rs)"
    fi
    has=$(rustc --version | cut -d' ' -f2)
    [ "$(printf '%s\n' "$least" "$has" | sort -V | head -1)" = "$least" ] ||
        fail "rustc $has is too old: kcm needs Rust $least or newer; update it (rustup update, rustup.rs)"
    need cc gcc
    need lscpu util-linux
    export CARGO_BUILD_TARGET=${CARGO_BUILD_TARGET:-$(rustc -vV | sed -n 's/^host: //p')}
    # cargo ignores the flags of a target if RUSTFLAGS is set.
    local name=RUSTFLAGS static="-C target-feature=+crt-static"
    [ -n "${RUSTFLAGS:-}" ] || name=CARGO_TARGET_$(tr a-z- A-Z_ <<<"$CARGO_BUILD_TARGET")_RUSTFLAGS
    case "${!name:-}" in
    *"$static"*) ;;
    *) export "$name=${!name:-} $static" ;;
    esac
}

# need_component COMMAND COMPONENT: a part of the toolchain that rustup's profile `minimal` leaves out.
need_component() {
    command -v "$1" >/dev/null || fail "$1 is missing; install it: rustup component add $2"
}

# Builds the release program as target/static/kcm. Options of cargo follow; without any, it is quiet.
build_static() {
    [ $# -gt 0 ] || set -- --quiet
    cargo build "$@" --release --bin kcm
    install -D -m 755 "${CARGO_TARGET_DIR:-target}/$CARGO_BUILD_TARGET/release/kcm" target/static/kcm
}

need_mount() {
    [ "$(id -u)" = 0 ] || fail "mounting needs root; run it as root"
    [ -e /dev/fuse ] || modprobe fuse 2>/dev/null || true
    [ -e /dev/fuse ] || mknod /dev/fuse c 10 229
    true <>/dev/fuse || fail "/dev/fuse cannot be opened; load the module fuse, or give the container the device"
}
