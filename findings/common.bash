# Sourced by the scripts: check PACKAGES... makes an environment with them, runs the program on standard input in it,
# and compares its output with $expected.
set -euo pipefail

check() {
  local folder status=0
  folder=$(mktemp -d)
  # shellcheck disable=SC2064
  trap "rm -rf '$folder'" EXIT
  cat >"$folder/program.py"
  local venv="${ENVIRONMENT:-$folder/venv}"
  [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
  # shellcheck disable=SC2086
  "$venv/bin/python" -m pip install --quiet ${PIP_ARGS:-} "$@"
  (cd "$folder" && HF_HUB_OFFLINE=1 "$venv/bin/python" program.py) >"$folder/output" 2>"$folder/errors" || status=$?
  echo "packages: $*"
  cat "$folder/output"
  if [ "$status" -ne 0 ]; then
    tail -n 5 "$folder/errors" >&2
    echo "CHANGED: the program ended with $status" >&2
    return 1
  fi
  if ! diff <(printf '%s\n' "$expected") "$folder/output"; then
    echo "CHANGED: the output is not the one stated (lines with < are stated)" >&2
    return 1
  fi
  echo "as stated"
}
