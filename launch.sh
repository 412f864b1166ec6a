#!/usr/bin/env bash
# Sets up .venv where needed, then hands over to the program; `./launch.sh --help` tells more.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
venv=$root/.venv
stamp=$venv/set-up-from # Written last: what the environment was made from.
uv_version=0.13.9       # Fetched only where no uv is installed.

usage() {
  cat <<'END'
usage: ./launch.sh WORD [OPTIONS]

  local                   embed a corpus on this machine; without --input, a sample corpus
  prism, flink, dataflow  the same on another of Beam's runners
  search "a query"        find the documents closest to a query
  inspect                 say what the last snapshot holds
  test [PYTEST OPTIONS]   run all checks
  train, evaluate, ...    every other command of `python -m pipeline`; WORD --help lists its options

The first call sets up .venv with the versions of constraints.txt. It needs Python 3.10 or later (PYTHON=/path/to/python
chooses one) and a network.
END
}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# --- What the environment is made of ---

recipe() {
  printf '%s\n' "$root" "$(<"$root/setup.py")" "$(<"$root/pyproject.toml")" "$(<"$root/constraints.txt")"
}

# True where .venv is whole, made from the files as they are now, and of the Python that was asked for.
is_ready() {
  [[ -x $venv/bin/python && -f $stamp && $(<"$stamp") == "$(recipe)" ]] || return 1
  [[ -z ${PYTHON:-} || $(describe "$venv/bin/python") == "$(describe "$PYTHON")" ]]
}

describe() {
  "$1" -E -S -c 'import sys; print(sys.version_info[:3], sys.base_prefix)' 2>/dev/null
}

# --- Set-up ---

# Prints the path of a Python 3.10 or later.
find_python() {
  local name
  if [[ -n ${PYTHON:-} ]]; then
    resolve "$PYTHON" || fail "PYTHON=$PYTHON is no Python 3.10 or later"
    return
  fi
  # Each is tried, because a name can exist and fail: pyenv's shims do for versions that are not switched on.
  for name in python3.13 python3.12 python3.11 python3.10 python3 python; do
    if resolve "$name"; then
      return
    fi
  done
  fail "no Python 3.10 or later was found: install one, or name it with PYTHON=/path/to/python ./launch.sh ..."
}

# Of the Python of .venv, activated say, it prints the one that it was made with: .venv is about to be removed.
resolve() {
  "$1" -c '
import os, sys
assert sys.version_info >= (3, 10)
is_ours = os.path.realpath(sys.prefix) == os.path.realpath(sys.argv[1])
print(os.path.realpath(sys._base_executable) if is_ours else sys.executable)' "$venv" 2>/dev/null
}

# Prints the path of a uv, which is fetched into .cache where there is none; nothing outside the repository changes.
find_uv() {
  local python=$1 folder=$root/.cache/uv-$uv_version
  if uv --version >/dev/null 2>&1; then
    echo uv
    return
  fi
  if ! "$folder/bin/uv" --version >/dev/null 2>&1; then
    rm -rf "$folder" "$folder.venv"
    if ! "$python" -m pip --version >/dev/null 2>&1; then
      "$python" -m venv "$folder.venv" >/dev/null 2>&1 ||
        fail "$python has neither pip nor venv, and there is no uv: install one of them (on Debian and Ubuntu" \
          "\`apt install python3-venv\`), then call again"
      python=$folder.venv/bin/python
    fi
    # The first two refuse this install where people set them for their own; the last is a warning beside the point.
    PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 PIP_ROOT_USER_ACTION=ignore "$python" -m pip install --quiet --disable-pip-version-check \
      --target "$folder" "uv==$uv_version" >&2 || fail "uv $uv_version could not be fetched with $python -m pip"
    rm -rf "$folder.venv"
  fi
  echo "$folder/bin/uv"
}

# uv does not read pip's settings: a private index or certificate set for pip counts for uv too, unless uv has its own.
adopt_pip_settings() {
  local python=$1
  [[ -n ${UV_DEFAULT_INDEX:-${UV_INDEX_URL:-}} ]] || export_if_set UV_DEFAULT_INDEX "$(pip_setting "$python" index-url)"
  [[ -n ${UV_INDEX:-${UV_EXTRA_INDEX_URL:-}} ]] || export_if_set UV_INDEX "$(pip_setting "$python" extra-index-url)"
  [[ -n ${SSL_CERT_FILE:-} ]] || export_if_set SSL_CERT_FILE "$(pip_setting "$python" cert)"
}

pip_setting() {
  local python=$1 name=$2 variable
  variable=PIP_$(tr 'a-z-' 'A-Z_' <<<"$name")
  if [[ -n ${!variable:-} ]]; then
    echo "${!variable}"
  else
    "$python" -m pip config get "global.$name" 2>/dev/null || true
  fi
}

export_if_set() {
  if [[ -n $2 ]]; then
    export "$1=$2"
  fi
}

# Makes .venv from nothing, also over what an interrupted set-up left: uv's cache makes that cheap, and nothing stale
# stays. Runs in a subshell, whose folder and variables are its own.
make_venv() (
  local python=$1 uv quiet=()
  cd "$root" # Settings of uv that lie in the caller's folder are not ours.
  [[ -t 2 ]] || quiet=(--quiet)
  echo "Setting up $venv with $python (once; half a minute where the network is fast) ..." >&2
  uv=$(find_uv "$python")
  adopt_pip_settings "$python"
  rm -rf "$venv"
  "$uv" venv --quiet --seed --python "$python" "$venv"
  "$uv" pip install ${quiet[@]+"${quiet[@]}"} --python "$venv/bin/python" --constraint constraints.txt --editable '.[test]'
  recipe >"$stamp.new"
  mv "$stamp.new" "$stamp"
)

set_up() {
  local python
  python=$(find_python)
  mkdir -p "$root/.cache"
  # One set-up at a time. The lock belongs to this shell and its children, and ends with them, however they end.
  exec 9>"$root/.cache/set-up.lock"
  "$python" -c '
import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("Waiting for another set-up of this folder ...", file=sys.stderr)
    fcntl.flock(9, fcntl.LOCK_EX)'
  is_ready || make_venv "$python"
  exec 9>&-
}

# --- Words ---

# Runs every check, also after one that failed; the options go to pytest. All tests are run by two processes, the Flink
# cluster's by one and the rest by the other: they wait for other programs half of the time.
run_checks() {
  local failed=0
  (($#)) || set -- --numprocesses=2 --dist=loadfile --no-loadscope-reorder
  cd "$root"
  PATH=$venv/bin:$PATH
  check ruff check
  check ruff format --check
  check mypy
  check pytest "$@"
  return "$failed"
}

check() {
  echo "== $*"
  "$@" || failed=1
}

case ${1:-} in
  '' | -h | --help | help)
    usage
    exit
    ;;
esac

is_ready || set_up

# Images often set this. Here it would cost every start, and every worker's, seconds of compiling PyTorch and Beam again.
unset PYTHONDONTWRITEBYTECODE

if [[ $1 == test ]]; then
  run_checks "${@:2}"
else
  # The folder of the caller stays current, and its paths mean what they say; Python must not import a `pipeline` that
  # happens to lie in it, as `python -m` would. Worker processes heed the variable, from Python 3.11 on.
  export PYTHONSAFEPATH=1
  exec "$venv/bin/embed-corpus" "$@"
fi
