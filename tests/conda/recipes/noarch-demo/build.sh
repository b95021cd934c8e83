# shellcheck shell=bash
set -euo pipefail
packages=$PREFIX/lib/python3.11/site-packages
mkdir -p "$PREFIX/bin" "$packages"
cat >"$packages/noarch_demo.py" <<'EOF'
import sys


def main():
    print(sys.prefix, __file__)
EOF
cat >"$PREFIX/bin/noarch-script" <<EOF
#!$PREFIX/bin/python
import noarch_demo
noarch_demo.main()
EOF
chmod 755 "$PREFIX/bin/noarch-script"
