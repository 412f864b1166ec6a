#!/usr/bin/env bash
# A Flink cluster on this machine, with a worker pool whose Python lacks our package; `cluster.sh help` tells more.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
root=$(cd -- "$here/../.." && pwd -P)

usage() {
  cat <<'END'
usage: deploy/flink/cluster.sh fetch | up | down | status

  fetch   fetch and build what is missing or no longer right, into .cache/flink, and start nothing
  up      the same, and start a JobManager, two TaskManagers and a worker pool, or those of them that have stopped
  down    end all of them, whatever became of them
  status  say which of them run

Needs Linux, Java, Maven, Go, and the environment that ./launch.sh sets up. Then:

  ./launch.sh flink --flink_master=localhost:8081 [OPTIONS]

Settings come from the environment: FLINK_REST_PORT (8081), FLINK_RPC_PORT (6123), FLINK_POOL_PORT (50000),
FLINK_TASK_MANAGERS (2), FLINK_SLOTS (2, of each), FLINK_TASK_MANAGER_MEMORY (2048m, and 256m for each slot above two),
FLINK_PROPERTIES (lines KEY: VALUE for Flink's config.yaml, which replace those of this script), FLINK_CLUSTER (the folder
of the cluster's logs), FLINK_CACHE (the folder of what is fetched), PYTHON.
END
}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

case ${1:-} in
  fetch | up | down | status) ;;
  -h | --help | help)
    usage
    exit
    ;;
  *)
    usage >&2
    exit 2
    ;;
esac
[[ -d /proc/self ]] || fail "this script needs Linux; Flink itself does not"

# --- Settings, from the environment ---

for setting in FLINK_REST_PORT FLINK_RPC_PORT FLINK_POOL_PORT FLINK_TASK_MANAGERS FLINK_SLOTS; do
  [[ ${!setting:-1} =~ ^[1-9][0-9]{0,4}$ ]] || fail "$setting=${!setting} is no whole number from 1"
done
while IFS= read -r line; do
  [[ -z $line || $line =~ ^[a-z][a-z0-9.-]*:\ . ]] ||
    fail "FLINK_PROPERTIES has the line '$line': write KEY: VALUE, a line for each, and dots in keys instead of indents"
done <<<"${FLINK_PROPERTIES:-}"
[[ ${FLINK_TASK_MANAGER_MEMORY:-2g} =~ ^[1-9][0-9]*[kmg]$ ]] ||
  fail "FLINK_TASK_MANAGER_MEMORY=$FLINK_TASK_MANAGER_MEMORY is no amount of memory: write 4g or 3072m"

# Folders are named as the system names them, whatever links and dots lead there: by that name processes are found.
cache=$(realpath -m -- "${FLINK_CACHE:-$root/.cache/flink}") # What is downloaded or built once.
cluster=$(realpath -m -- "${FLINK_CLUSTER:-$cache/cluster}") # One cluster: its settings, logs and process ids.
rest_port=${FLINK_REST_PORT:-8081}                           # Web page and REST.
rpc_port=${FLINK_RPC_PORT:-6123}                             # Between JobManager and TaskManagers.
pool_port=${FLINK_POOL_PORT:-50000}                          # Worker pool.
task_managers=${FLINK_TASK_MANAGERS:-2}
slots=${FLINK_SLOTS:-2}                  # Of each TaskManager; they share one worker process and its model.
# Of each TaskManager. Flink divides it up by shares: 256 MB more leave its heap as it is with 128 MB more off-heap.
memory=${FLINK_TASK_MANAGER_MEMORY:-$((slots > 2 ? 1536 + 256 * slots : 2048))m}
python=${PYTHON:-$root/.venv/bin/python} # With our dependencies; the workers get a copy of them.

flink_version=1.19.3
libraries="apache-flink-libraries==$flink_version --hash=sha256:4a58e3a1fb7d83340bc96b6c080624c6d792d69fae5d294b96224775204a9c60"
# One of its wheels serves everywhere: only scripts are taken from it.
scripts="apache-flink==$flink_version --hash=sha256:ff572c6ffa3867c21b8a455aefb50c53c91973fd0408df594ca26cb0a7bebc77"

flink=$cache/flink-$flink_version
worker_python=$cache/worker-python
pids=$cluster/pids
run=$cluster/run # The current folder of all processes of the cluster, and of no others: by it they are known.
temporary=$cluster/tmp # Of all processes: those that are killed leave files behind.
starter=$cluster/start-worker.sh
mark='# Becomes a worker of deploy/flink/cluster.sh.' # In the starter: by it a folder is known as a cluster of this script.
export FLINK_LIB_DIR=$cluster/lib FLINK_CONF_DIR=$cluster/conf FLINK_LOG_DIR=$cluster/log FLINK_PID_DIR=$cluster/flink-pids

# --- What is fetched once; each folder gets its name when it is whole ---

check_tools() {
  command -v java >/dev/null || fail "there is no Java: install it (on Debian and Ubuntu \`apt install openjdk-17-jre-headless\`)"
  command -v go >/dev/null || [[ -x $(boot_path) ]] ||
    fail "there is no Go, which builds the program that starts the workers: install Go 1.23 or later (https://go.dev/dl)"
  [[ -x $python ]] || fail "there is no $python: run ./launch.sh --help once to see how it is set up, then" \
    "\`./launch.sh sample --help\`, or name a Python that has our dependencies with PYTHON=/path/to/python"
}

# Makes the folder $1 with the command that follows, which is given a folder to fill; not at all where it is there.
make_once() {
  local folder=$1 new
  shift
  [[ -d $folder ]] && return
  mkdir -p "$cache"
  new=$(mktemp -d "$folder.new.XXXXXX")
  # In a subshell of its own, whose failure ends this one: `set -e` counts for nothing behind `||`.
  if ! (set -euo pipefail && "$@" "$new"); then
    rm -rf "$new"
    exit 1
  fi
  if [[ -d $folder ]]; then rm -rf "$new"; else mv "$new" "$folder"; fi
}

# Flink as PyPI has it: jars in one package, scripts in another.
fetch_flink() {
  local new=$1
  echo "Fetching Flink $flink_version from PyPI (once; 230 MB) ..." >&2
  "$python" -m venv "$new/pip" # Not everybody's environment has pip.
  download() {
    "$new/pip/bin/pip" download --quiet --disable-pip-version-check --no-deps --require-hashes --dest "$new/downloads" "$@" >&2
  }
  echo "$libraries" >"$new/libraries.txt"
  echo "$scripts" >"$new/scripts.txt"
  download --no-binary :all: --requirement "$new/libraries.txt"
  download --only-binary :all: --python-version 3.11 --implementation cp --platform manylinux2014_x86_64 \
    --requirement "$new/scripts.txt"
  tar xzf "$new"/downloads/apache-flink-libraries-*.tar.gz -C "$new" --strip-components=2 \
    "apache-flink-libraries-$flink_version/deps"
  "$python" -m zipfile -e "$new"/downloads/apache_flink-*.whl "$new/wheel"
  cp "$new"/wheel/pyflink/bin/* "$new/bin/"
  chmod +x "$new"/bin/*.sh "$new/bin/flink"
  mv "$new/wheel/pyflink/conf" "$new/conf"
  rm -rf "$new/wheel" "$new/downloads" "$new/pip" "$new"/*.txt
}

# The workers' Python: what the submitter has, linked file by file, but for our own package, which each job brings.
copy_python() {
  local new=$1 prefix
  echo "Copying the environment for the workers ..." >&2
  prefix=$("$python" -c 'import sys; print(sys.prefix)')
  cp -al "$prefix/." "$new/" 2>/dev/null || {
    rm -rf "$new" && mkdir "$new" # Copies cannot be made over links of the same files.
    cp -a "$prefix/." "$new/"
  }
  rm -rf "$new"/lib/python*/site-packages/{embed_corpus-*,__editable__*embed_corpus*,__pycache__/__editable__*embed_corpus*}
  # Jobs' packages are built and installed with these.
  "$new/bin/python" -m pip --version >/dev/null 2>&1 || "$new/bin/python" -m ensurepip >/dev/null
  (cd "$new" && env -u PYTHONPATH bin/python -c 'import setuptools') 2>/dev/null ||
    "$new/bin/python" -m pip install --quiet --disable-pip-version-check 'setuptools>=77' >&2
  packages >"$new/made-from"
}

boot_path() {
  echo "$cache/boot-$(beam_version)/container"
}

beam_version() {
  "$python" -c 'from importlib.metadata import version; print(version("apache-beam"))'
}

# Beam's own program that prepares a worker: fetches the job's package and options, installs, starts Python.
build_boot() {
  local new=$1
  echo "Building Beam's boot program with Go (once; two minutes) ..." >&2
  GOBIN=$new go install "github.com/apache/beam/sdks/v2/python/container@v$(beam_version)" >&2
}

fetch() {
  check_tools
  mkdir -p "$cache"
  exec 8>"$cache/lock"
  flock 8 # Two that fetch at once would take each other's halves away.
  rm -rf "$flink".new.* "$worker_python".new.* "$cache"/boot-*.new.* # Of those that were killed.
  job_server=$(FLINK_CACHE=$cache "$here/build-job-server.sh")
  make_once "$flink" fetch_flink
  make_once "$(dirname "$(boot_path)")" build_boot
  # Made anew where the submitter's packages changed.
  if [[ ! -f $worker_python/made-from || $(<"$worker_python/made-from") != "$(packages)" ]]; then
    rm -rf "$worker_python"
    make_once "$worker_python" copy_python
  fi
  exec 8>&- # Else what is started would hold it.
}

packages() {
  "$python" -c '
import importlib.metadata as m, sys
print(sys.executable, sys.version)
print(*sorted(f"{d.name}=={d.version}" for d in m.distributions()), sep="\n")'
}

# --- Up ---

# Ends the script where the cluster's folder is somebody else's: parts of it are deleted, and processes in it killed.
check_folder() {
  [[ -d $cluster || ! -e $cluster ]] || fail "FLINK_CLUSTER=$cluster is not a folder"
  if [[ -d $cluster && -n $(find "$cluster" -mindepth 1 -maxdepth 1 -print -quit) ]]; then
    grep -qs "^$mark" "$starter" ||
      fail "FLINK_CLUSTER=$cluster holds something else than a cluster of this script: name a new or an empty folder"
  fi
}

# Makes the folder anew, but for what is not from here.
make_cluster() {
  local folders=("$FLINK_LIB_DIR" "$FLINK_CONF_DIR" "$FLINK_LOG_DIR" "$FLINK_PID_DIR" "$pids" "$run" "$temporary" "$cluster/workers")
  mkdir -p "$cluster"
  write_worker_starter # First, so that the folder stays known as ours whatever ends this.
  rm -rf "${folders[@]}"
  mkdir "${folders[@]}"
  link_libraries
  write_settings
}

# Flink's jars, and Beam's beside them, see the class loader's setting below.
link_libraries() {
  local jar
  ln -s "$flink"/lib/*.jar "$FLINK_LIB_DIR/"
  for jar in "$(dirname "$job_server")"/lib/*.jar; do
    case ${jar##*/} in
      flink-* | slf4j-* | log4j-*) ;; # Flink has its own.
      *) ln -s "$jar" "$FLINK_LIB_DIR/" ;;
    esac
  done
}

write_settings() {
  cp "$flink"/conf/* "$FLINK_CONF_DIR/"
  # Through here goes what each slot has on its way to the workers: README.md tells how much.
  local off_heap_mb=$((slots > 2 ? 128 * slots : 256))
  cat >"$FLINK_CONF_DIR/config.yaml" <<END
$(sed -n '/^env:/,/^[^ #]/p' "$flink/conf/config.yaml" | sed '$d')
jobmanager.bind-host: localhost
jobmanager.rpc.address: localhost
jobmanager.rpc.port: $rpc_port
jobmanager.memory.process.size: 1024m
taskmanager.bind-host: localhost
taskmanager.host: localhost
taskmanager.memory.process.size: $memory
taskmanager.memory.framework.off-heap.size: ${off_heap_mb}m
taskmanager.numberOfTaskSlots: $slots
# The job is one graph of many shuffles: Flink's own 128 MB of buffers, taken 512 at a time, are too few for it.
taskmanager.memory.network.min: 192m
taskmanager.memory.network.max: 1g
taskmanager.network.sort-shuffle.min-buffers: 64
rest.address: localhost
rest.bind-address: localhost
rest.port: $rest_port
# By its relative name, which holds no space: all stand in the folder \`run\`.
env.java.opts.jobmanager: -Djava.io.tmpdir=../tmp
env.java.opts.taskmanager: -Djava.io.tmpdir=../tmp
# With Beam's classes loaded by Flink itself, workers live from one phase of a job to the next, as
# --environment_cache_millis says; with those that come with the job, each phase starts its own.
classloader.resolve-order: parent-first
# A TaskManager that is gone is missed sooner than after 50 seconds.
heartbeat.interval: 2000
heartbeat.timeout: 20000
END
  local line
  while IFS= read -r line; do # Flink does not take a setting twice.
    [[ -n $line ]] || continue
    sed -i "/^${line%%:*}:/d" "$FLINK_CONF_DIR/config.yaml"
    printf '%s\n' "$line" >>"$FLINK_CONF_DIR/config.yaml"
  done <<<"${FLINK_PROPERTIES:-}"
}

write_worker_starter() {
  cat >"$starter" <<END
#!/usr/bin/env bash
$mark What a job brings is installed into the folder \$1, of this worker alone.
set -euo pipefail
folder=\$1
shift
"$worker_python/bin/python" -m venv --without-pip "\$folder/venv"
site=\$("\$folder/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$worker_python/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"\$site/worker-python.pth"
export PATH=\$folder/venv/bin:\$PATH RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1
exec "$(boot_path)" --semi_persist_dir="\$folder" "\$@"
END
  chmod +x "$starter"
}

# Starts a command in a process group of its own, apart from this terminal, and notes its id as $1.
start() {
  local name=$1
  shift
  set -m
  (cd "$run" && TMPDIR=$temporary exec "$@") </dev/null >"$FLINK_LOG_DIR/$name.out" 2>&1 &
  echo "$!" >"$pids/$name.pid"
  set +m
}

start_part() {
  case $1 in
    jobmanager) start "$1" "$flink/bin/jobmanager.sh" start-foreground ;;
    taskmanager-*) start "$1" "$flink/bin/taskmanager.sh" start-foreground ;;
    pool) # Started beside the repository, not in it: a worker must not find our package where it stands.
      start "$1" env -u PYTHONPATH -u PYTHONSAFEPATH PATH="$worker_python/bin:$PATH" \
        "$worker_python/bin/python" "$here/worker_pool.py" --service_port="$pool_port" \
        --executable="$starter" --folder="$cluster/workers"
      ;;
  esac
}

up() {
  local name number port names=()
  fetch
  if [[ -n $(started) && -n $(running) ]]; then
    while read -r name _; do names+=("$name"); done < <(stopped) # The rest goes on as it is.
  else
    for port in "$rest_port" "$rpc_port" "$pool_port"; do
      ! answers "$port" || fail "port $port is taken: choose others (\`deploy/flink/cluster.sh help\` names the settings)"
    done
    make_cluster
    names=(jobmanager pool)
    for ((number = 1; number <= task_managers; number++)); do names+=("taskmanager-$number"); done
  fi
  for name in ${names[@]+"${names[@]}"}; do start_part "$name"; done
  wait_until_ready || {
    tail -n 20 "$FLINK_LOG_DIR"/*.out >&2
    down
    fail "the cluster did not come up within two minutes; its logs are in $FLINK_LOG_DIR"
  }
  echo "Flink $flink_version is up: http://localhost:$rest_port, worker pool at localhost:$pool_port"
}

answers() {
  (exec 3<>"/dev/tcp/localhost/$1") 2>/dev/null
}

wait_until_ready() {
  local deadline=$((SECONDS + 120))
  while ((SECONDS < deadline)); do
    if answers "$pool_port" && [[ $(registered) == "$task_managers" ]] && all_registered; then
      return
    fi
    [[ -z $(stopped) ]] || return 1
    sleep 0.5
  done
  return 1
}

# The JobManager takes a while to miss one that is gone, so each must say for itself that it is known.
all_registered() {
  local number
  for ((number = 1; number <= task_managers; number++)); do
    grep -q 'Successful registration at resource manager' "$FLINK_LOG_DIR/taskmanager-$number.out" || return 1
  done
}

# Prints how many TaskManagers the JobManager knows.
registered() {
  "$python" -c '
import json, sys, urllib.request
try:
    with urllib.request.urlopen(f"http://localhost:{sys.argv[1]}/overview", timeout=5) as answer:
        print(json.load(answer)["taskmanagers"])
except OSError:
    print("no JobManager")' "$rest_port"
}

# --- Down and status ---

# Prints name and id of each process that `up` started, running or not.
started() {
  local file
  for file in "$pids"/*.pid; do
    [[ -f $file ]] || continue
    printf '%s %s\n' "$(basename "$file" .pid)" "$(<"$file")"
  done
}

# Prints the ids of all processes of this cluster, the workers' too.
running() {
  local process
  for process in /proc/[0-9]*; do
    if [[ $(readlink "$process/cwd") == "$run"* ]]; then
      echo "${process#/proc/}"
    fi
  done 2>/dev/null
}

# Prints those of them that run no longer.
stopped() {
  local name id
  while read -r name id; do
    [[ $(readlink "/proc/$id/cwd") == "$run"* ]] || printf '%s %s\n' "$name" "$id"
  done < <(started) 2>/dev/null
}

down() {
  local id tries
  for ((tries = 0; tries < 60; tries++)); do
    [[ -n $(running) ]] || break
    for id in $(running); do
      if ((tries == 0)); then kill "$id"; elif ((tries >= 50)); then kill -9 "$id"; fi 2>/dev/null || true
    done
    sleep 0.2
  done
  rm -rf "$pids" "$run" "$FLINK_PID_DIR" "$temporary" "$cluster/workers"
}

status() {
  local name id
  if [[ -z $(started) ]]; then
    echo "no cluster runs in $cluster"
    return 1
  fi
  while read -r name id; do
    if [[ $(stopped) == *"$name $id"* ]]; then echo "$name has stopped"; else echo "$name runs (process $id)"; fi
  done < <(started)
  echo "TaskManagers at http://localhost:$rest_port: $(registered)"
  [[ -z $(stopped) ]]
}

[[ $1 == fetch ]] || check_folder
"$1"
