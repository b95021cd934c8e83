# shellcheck shell=bash
set -euo pipefail
conda=$PREFIX/etc/conda
mkdir -p "$conda"/{activate,deactivate,env_vars}.d "$PREFIX/share/activate-demo"

# They are sourced in the order of their names. Real ones do read variables that are not set.
cat >"$conda/activate.d/01-demo.sh" <<'EOF'
export DEMO_BEFORE="$DEMO_HOME"
export DEMO_HOME="$CONDA_PREFIX/share/activate-demo"
EOF
cat >"$conda/activate.d/02-baked.sh" <<EOF
export DEMO_BAKED="$PREFIX/share/activate-demo"
export DEMO_ORDER="after \$DEMO_HOME"
EOF
cat >"$conda/deactivate.d/01-demo.sh" <<'EOF'
unset DEMO_HOME DEMO_BEFORE
EOF
cat >"$conda/deactivate.d/02-baked.sh" <<EOF
[ "\$DEMO_BAKED" = "$PREFIX/share/activate-demo" ] && unset DEMO_BAKED DEMO_ORDER
EOF
cat >"$conda/activate.d/01-demo.csh" <<'EOF'
setenv DEMO_HOME "$CONDA_PREFIX/share/activate-demo"
EOF
cat >"$conda/activate.d/01-demo.fish" <<'EOF'
set -gx DEMO_HOME "$CONDA_PREFIX/share/activate-demo"
EOF
printf '{"DEMO_PACKAGE": "from env_vars.d", "DEMO_PATH": "%s/share"}\n' "$PREFIX" \
  >"$conda/env_vars.d/activate-demo.json"
echo data >"$PREFIX/share/activate-demo/data.txt"
