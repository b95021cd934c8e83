#!/bin/sh
# Gets a machine ready for the project; `make setup` calls it and knows what is out of date.
#
#   tests/setup.sh tools    Debian packages that are missing (as root), .venv, the tools in it
#   tests/setup.sh wheel    builds the wheel and puts it into .venv; needs no network
#
# PYTHON (default /usr/bin/python3) is the interpreter that .venv is made from.
set -eu
cd "$(dirname "$0")/.."
repo=$(pwd -P)
python=${PYTHON:-/usr/bin/python3}

say() { echo "setup: $*" >&2; }

# Registries hiccup: five attempts, each wait longer than the one before.
retry() {
    attempt=1
    until "$@"; do
        if [ "$attempt" -ge 5 ]; then
            say "gave up after $attempt attempts: $*"
            return 1
        fi
        say "attempt $attempt failed, next one in $((attempt * 5)) s: $*"
        sleep $((attempt * 5))
        attempt=$((attempt + 1))
    done
}

# Prints the Debian packages whose program is not here.
missing_packages() {
    while read -r program package; do
        command -v "$program" >/dev/null 2>&1 || echo "$package"
    done <<'PROGRAMS'
/usr/bin/python3 python3
git git
flock util-linux
mount mount
mksquashfs squashfs-tools
squashfuse squashfuse
mkfs.erofs erofs-utils
fusermount3 fuse3
zstd zstd
pigz pigz
rsync rsync
bsdtar libarchive-tools
pgrep procps
strace strace
/usr/sbin/sshd openssh-server
ssh openssh-client
ip iproute2
shellcheck shellcheck
busybox busybox
dash dash
bash bash
zsh zsh
csh csh
fish fish
tmux tmux
PROGRAMS
    [ -e /etc/ssl/certs/ca-certificates.crt ] || echo ca-certificates
    # Debian keeps these out of its python3 package.
    /usr/bin/python3 -c 'import ensurepip' 2>/dev/null || echo python3-venv
    /usr/bin/python3 -c 'import pip' 2>/dev/null || echo python3-pip
}

# A list fetched yesterday may name files that are gone today: each attempt starts with update.
apt_install() {
    apt-get -q update >&2 &&
        apt-get -qqy -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 \
            install --no-install-recommends "$@" >&2
}

install_packages() {
    packages=$(missing_packages | tr '\n' ' ')
    [ -n "$packages" ] || return 0
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
        say "missing: $packages"
        say "hint: install these packages (as root on Debian 12, \`make setup\` does it), then try again"
        return 1
    fi
    say "installing $packages"
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086 # one word for each package
    retry apt_install $packages
    packages=$(missing_packages | tr '\n' ' ')
    [ -z "$packages" ] || { say "still missing after installing: $packages"; return 1; }
}

pip() { .venv/bin/python -m pip --disable-pip-version-check -qq "$@"; }

# Everything in .venv knows where it lies: a moved or copied checkout needs a new one.
venv_is_usable() {
    [ "$(cat .venv/made-for 2>/dev/null)" = "$repo $python" ] && .venv/bin/python -c 'import pip' 2>/dev/null
}

tools() {
    install_packages
    if ! venv_is_usable; then
        say "making .venv from $python"
        "$python" -m venv --clear .venv
        echo "$repo $python" >.venv/made-for
    fi
    say "installing the tools"
    retry pip install --upgrade 'pip>=25.1' # the first that knows dependency groups
    retry pip install --group dev
}

wheel() {
    say "building and installing the wheel"
    rm -rf .build/wheel
    .venv/bin/pyproject-build --wheel --no-isolation --outdir .build/wheel . >.build/wheel.log 2>&1 || {
        cat .build/wheel.log >&2
        return 1
    }
    pip install --no-index --no-deps --force-reinstall .build/wheel/*.whl
    retry pip install .build/wheel/*.whl # its dependencies, where they are not there yet
}

case "${1-}" in
tools | wheel) ;;
*)
    say "usage: tests/setup.sh tools|wheel"
    exit 2
    ;;
esac

# pip and build leave their temporary files where they like; this is where they like it.
TMPDIR=$(mktemp -d)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

mkdir -p .build
exec 9>.build/lock
# On the most minimal machine flock comes with what is installed below; nobody else runs there.
if command -v flock >/dev/null 2>&1; then flock 9; fi

"$1" 9>&- # nothing started here may go on holding the lock
