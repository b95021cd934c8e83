# shellcheck shell=bash
set -euo pipefail
mkdir -p "$PREFIX"/{bin,share/postlink-demo}
echo packaged >"$PREFIX/share/postlink-demo/packaged.txt"
cat >"$PREFIX/bin/.postlink-demo-post-link.sh" <<'EOF'
#!/bin/sh
set -eu
cd "$PREFIX/share/postlink-demo"
printf '"%s/lib/loaders/one.so"\n' "$PREFIX" >loaders.cache
printf 'caf\351 %s/share\n' "$PREFIX" >latin1.txt
printf '\377\376' >utf16.txt
printf 'prefix=%s\n' "$PREFIX" | iconv -f UTF-8 -t UTF-16LE >>utf16.txt
EOF
chmod 755 "$PREFIX/bin/.postlink-demo-post-link.sh"
