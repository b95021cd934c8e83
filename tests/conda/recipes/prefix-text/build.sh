# shellcheck shell=bash
set -euo pipefail
share=$PREFIX/share/prefix-text
mkdir -p "$share" "$PREFIX"/bin "$PREFIX"/lib/{pkgconfig,cmake/demo,R/bin,R/etc} \
  "$PREFIX"/share/jupyter/kernels/python3

# Programs

program() { # path
  cat >"$1"
  chmod 755 "$1"
}
program "$PREFIX/bin/demo-config" <<E
#!/bin/sh
echo "$PREFIX/share/prefix-text"
E
program "$PREFIX/bin/demo-python" <<E
#!$PREFIX/bin/python
import sys
print(sys.prefix)
E
program "$PREFIX/bin/demo-python-option" <<E
#!$PREFIX/bin/python -s
import os, sys
print(os.listdir("$PREFIX/share/prefix-text") != [], sys.flags.no_user_site)
E
ln -s demo-config "$PREFIX/bin/demo-config-1"
ln -s ../share/prefix-text "$PREFIX/lib/demo-share"

# R's way: a script that starts the program proper, and the settings it reads

program "$PREFIX/lib/R/bin/R" <<E
#!/bin/sh
R_HOME_DIR=$PREFIX/lib/R
export R_HOME="\$R_HOME_DIR"
. "\$R_HOME_DIR/etc/ldpaths"
echo "\$R_HOME \$LD_LIBRARY_PATH"
E
ln -s ../lib/R/bin/R "$PREFIX/bin/R"
cat >"$PREFIX/lib/R/etc/ldpaths" <<E
: "\${R_LD_LIBRARY_PATH=$PREFIX/lib/R/lib:$PREFIX/lib}"
LD_LIBRARY_PATH=\$R_LD_LIBRARY_PATH
E
cat >"$PREFIX/lib/R/etc/Makeconf" <<E
R_HOME = $PREFIX/lib/R
LDFLAGS = -Wl,-rpath,$PREFIX/lib -Wl,-rpath-link,$PREFIX/lib -L$PREFIX/lib
E

# What build systems and programs read

cat >"$PREFIX/lib/pkgconfig/demo.pc" <<E
prefix=$PREFIX
libdir=\${prefix}/lib
Name: demo
Description: demo
Version: 1.0
Libs: -L$PREFIX/lib -ldemo
Cflags: -I\${prefix}/include
E
cat >"$PREFIX/lib/cmake/demo/demoConfig.cmake" <<E
set(demo_ROOT "$PREFIX")
set_target_properties(demo PROPERTIES IMPORTED_LOCATION "$PREFIX/lib/libdemo.so")
E
cat >"$PREFIX/share/jupyter/kernels/python3/kernel.json" <<E
{
 "argv": ["$PREFIX/bin/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
 "display_name": "Python 3",
 "language": "python"
}
E
cat >"$PREFIX/bin/qt.conf" <<E
[Paths]
Prefix = $PREFIX
Plugins = $PREFIX/lib/qt/plugins
E
cat >"$share/config.json" <<E
{"root": "$PREFIX", "twice": "$PREFIX/bin:$PREFIX/sbin"}
E

# Encodings and names

printf 'caf\303\251 %s\n' "$PREFIX" >"$share/utf8.txt"
printf 'caf\351 %s\n' "$PREFIX" >"$share/latin1.txt"
printf 'name %s\n' "$PREFIX" >"$share/with space and "$'\303\274'.txt
echo 'no prefix' >"$share/plain.txt"
