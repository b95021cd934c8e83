# shellcheck shell=bash
exec /usr/bin/python3 -I "$RECIPE_DIR/lay_out.py"
