# shellcheck shell=bash
set -euo pipefail
mkdir -p "$PREFIX"/{bin,lib,share/cbaked}
options=(-O1 "-DPREFIX=\"$PREFIX\"")
gcc "${options[@]}" -shared -fPIC -Wl,-soname,libcbaked.so.1 \
  -o "$PREFIX/lib/libcbaked.so.1.0" "$RECIPE_DIR/library.c"
ln -s libcbaked.so.1.0 "$PREFIX/lib/libcbaked.so.1"
ln -s libcbaked.so.1 "$PREFIX/lib/libcbaked.so"
gcc "${options[@]}" -o "$PREFIX/bin/cbaked" "$RECIPE_DIR/program.c" \
  -L"$PREFIX/lib" -lcbaked -Wl,-rpath,"$PREFIX/lib"
echo 'hello from the prefix' >"$PREFIX/share/cbaked/data.txt"
