# Sourced by the scripts here: set-up that every one of them needs. Says what it does; asks nothing.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }
fail() { printf 'error: %s\nhint: %s\n' "$1" "$2" >&2; exit 1; }

[ "$(uname -s)" = Linux ] || fail "this is no Linux" "cdp runs on Linux only"
[ "$(id -u)" = 0 ] || fail "not root" "the tracker, loop devices and mounts need root: sudo $0"
if ! command -v cargo >/dev/null && [ -x "$HOME/.cargo/bin/cargo" ]; then PATH="$HOME/.cargo/bin:$PATH"; fi
command -v cargo >/dev/null || fail "cargo is not there" "install Rust $(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml) or newer (https://rustup.rs)"

# install PACKAGE...: installs the Debian packages that are missing, and nothing when none is.
install() {
    local missing=() package
    for package in "$@"; do
        [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || fail "missing: ${missing[*]}" "install these packages by your distribution's means"
    say "installing ${missing[*]}"
    apt-get update -qq >&2
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# What a build needs: a C compiler for TLS and zstd, clang for the eBPF programs.
install_build_packages() { install build-essential clang llvm libbpf-dev pkg-config; }

# The pinned maps live in bpffs.
mount_bpffs() {
    [ "$(stat -f -c %T /sys/fs/bpf 2>/dev/null)" = bpf_fs ] && return 0
    say "mounting bpffs on /sys/fs/bpf"
    mount -t bpf bpf /sys/fs/bpf || fail "bpffs cannot be mounted" "is this a container? the tracker needs the host's rights"
}
