# shellcheck shell=bash
set -euo pipefail
mkdir -p "$PREFIX/lib"
modules=$(/usr/bin/python3 -I -c 'import sysconfig; print(sysconfig.get_config_var("DESTSHARED"))')
cpp=$(gcc -print-file-name=libstdc++.so.6) # for compiled packages
{
  ldd /usr/bin/python3 "$cpp" "$modules"/_{bz2,crypt,ctypes,curses,curses_panel,hashlib,lzma,sqlite3,ssl,uuid}.*.so "$modules"/readline.*.so
  echo "libstdc++.so.6 => $cpp"
} | awk '$2 == "=>" && $3 ~ /^\// { print $1, $3 }' | sort -u |
  while read -r soname path; do
    case $soname in
      ld-linux* | libc.so.* | libm.so.* | libdl.so.* | libpthread.so.* | librt.so.* | libutil.so.*) continue ;;
    esac
    file=$(basename "$(readlink -f "$path")")
    cp -L "$path" "$PREFIX/lib/$file"
    [ -e "$PREFIX/lib/$soname" ] || ln -s "$file" "$PREFIX/lib/$soname"
  done
