#!/bin/sh
# A tour on one machine: pack an environment, stage it, run from it while the original is hidden,
# and prove that nothing of the original is opened.
#
#   examples/demo.sh [ENVIRONMENT]
#
# `make demo` runs it. ENVIRONMENT is the directory of a virtual environment of yours, which is only
# read; without it, one with numpy is made. Everything else is made below one new directory in /tmp
# and removed at the end, however the tour ends.
set -eu

fail() {
    echo "demo: error: $*" >&2
    exit 1
}

title() { printf '\n== %s\n' "$*"; }

# Shows a command, then runs it.
show() {
    printf '$ %s\n' "$*"
    "$@"
}

# What a Python expression makes of the JSON object on standard input, called d.
json() { python3 -I -c "import json, sys; d = json.load(sys.stdin); print($1)"; }

now() { date +%s%N; }

# Milliseconds since $1 (from now), as seconds.
since() {
    milliseconds=$((($(now) - $1) / 1000000))
    printf '%d.%03d s' $((milliseconds / 1000)) $((milliseconds % 1000))
}

cleanup() {
    status=$?
    trap - EXIT
    trap '' HUP INT PIPE TERM
    set +e
    while read -r _ directory _; do
        case $directory in
        "$work"/*) fusermount3 -u -z "$directory" 2>/dev/null || umount -l "$directory" ;;
        esac
    done </proc/self/mounts
    rm -rf --one-file-system "$work"
    [ "$status" -eq 0 ] || echo "demo: ended early (status $status)" >&2
    [ ! -e "$work" ] || echo "demo: could not remove all of $work" >&2
    exit "$status"
}

for program in stager stage-run python3; do
    command -v "$program" >/dev/null || fail "$program is not on PATH; \`make demo\` puts it there"
done

# Not in TMPDIR: the store's path ends up in first lines of scripts and must be short and plain.
work=$(mktemp -d /tmp/stager-demo.XXXXXX)
trap cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 141' PIPE
trap 'exit 143' TERM

TMPDIR=$work/tmp # what an interrupted pip would leave in /tmp
STAGER_REPOSITORY=$work/shared/stager
STAGER_STORE=$work/node
export TMPDIR STAGER_REPOSITORY STAGER_STORE
mkdir "$TMPDIR"
unset STAGER_ENV STAGER_ACTIVE STAGER_PREFIX

title '1. An environment'
if [ $# -gt 0 ]; then
    environment=$(cd "$1" 2>/dev/null && pwd -P) || fail "there is no directory $1"
    code='import sys; print(sys.prefix)'
    imports=
else
    environment=$work/shared/envs/demo
    code='import sys, numpy; print(sys.prefix); print(numpy.__file__)'
    imports=numpy
    echo 'making a virtual environment with numpy (pip downloads it)'
    python3 -m venv "$environment"
    attempt=1
    until "$environment/bin/python" -m pip -qq --disable-pip-version-check install numpy; do
        [ "$attempt" -lt 5 ] || fail 'pip cannot install numpy; is there a network, or a pip.conf?'
        sleep $((attempt * 5))
        attempt=$((attempt + 1))
    done
fi
echo "$environment: $(find "$environment" | wc -l) files, directories and links"
if [ -n "$imports" ] && command -v strace >/dev/null &&
    PYTHONDONTWRITEBYTECODE=1 strace -f -qq -s 4096 -e trace=%file -o "$work/trace" \
        "$environment/bin/python" -c "import $imports" 2>/dev/null; then
    calls=$(grep -cF "\"$environment/" "$work/trace")
    echo "starting its Python and \`import $imports\`: $calls system calls that name a path in it"
fi

title '2. Pack it into one file on the shared file system'
show stager pack "$environment" --name demo

title '3. Stage it on this node'
begun=$(now)
staged=$(stager stage demo --json)
echo "first time:  $(since "$begun"), $(echo "$staged" | json 'd["how"]')"
begun=$(now)
stager stage demo >"$work/prefix"
echo "second time: $(since "$begun"), already there; nearly all of it is the start of \`stager\`"
prefix=$(cat "$work/prefix")
echo "it is at $prefix"

# A mount namespace of its own shows a command another content of that directory; nobody else sees
# a difference. Where that is forbidden, an environment of ours can be renamed instead.
# shellcheck disable=SC2016 # for the inner shell
cover='mount -n -t tmpfs -o ro,size=4k hidden "$1" && [ ! -e "$1/pyvenv.cfg" ] && shift && exec "$@"'
hidden() { "$@"; }
user=
[ "$(id -u)" -eq 0 ] || user=--map-root-user
if unshare $user --mount --propagation private \
    sh -c "$cover" sh "$environment" true 2>/dev/null; then
    hidden() { unshare $user --mount --propagation private sh -c "$cover" sh "$environment" "$@"; }
    title '4. Run from there, where the original is hidden (in a mount namespace of its own)'
elif [ $# -eq 0 ]; then
    mv "$environment" "$environment.away"
    title '4. Run from there, where the original is hidden (renamed)'
else
    title '4. Run from there (the original cannot be hidden here: mount namespaces are forbidden)'
fi

echo "\$ stage-run --env demo --strict python -c '$code'"
hidden stage-run --env demo --strict python -c "$code" >"$work/said"
cat "$work/said"
[ "$(head -n 1 "$work/said")" = "$prefix" ] || fail "sys.prefix is not $prefix"
if [ -x "$prefix/bin/pip" ]; then
    echo '$ stage-run --env demo --strict pip --version'
    hidden stage-run --env demo --strict pip --version
fi
# A rank whose environment is active already: stage-run starts no Python, it becomes the command.
# shellcheck disable=SC2016 # for the inner shell
hidden stage-run --env demo --strict sh -c 'date +%s%N; stage-run --env demo true; date +%s%N' \
    >"$work/said"
{ read -r begun && read -r ended; } <"$work/said"
echo "every further \`stage-run\` in that job: $(((ended - begun) / 1000000)) ms"

title '5. Verify: import, and watch every path'
[ ! -e "$environment.away" ] || mv "$environment.away" "$environment"
status=0
stager verify demo ${imports:+--import "$imports"} --json >"$work/verified" || status=$?
[ -s "$work/verified" ] || exit "$status"
json '"imported: %d of its top-level modules; of %d paths accessed (traced with %s), of the original: %d"
    % (len(d["modules"]), d["paths"], d["method"], len(d["origin"]))' <"$work/verified"

title '6. Clean up'
show stager release
show stager collect --all
show stager remove demo
(exit "$status")
