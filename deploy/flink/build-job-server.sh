#!/usr/bin/env bash
# Builds Beam's Flink job server with Maven and prints the path of its jar; at once where it is built already.
set -euo pipefail
unset CDPATH # With it, cd says where it went.

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
cache=${FLINK_CACHE:-$here/../../.cache/flink}
mkdir -p "$cache"
cache=$(cd -- "$cache" && pwd -P) # Maven takes a relative path as one beside the pom.
target=$cache/job-server
stamp=$target/built-from # Written last, before the folder gets its name: what it was built from.

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

print_jar() {
  local jars=("$target"/*job-server*.jar)
  printf '%s\n' "${jars[0]}"
}

is_built() {
  [[ -f $stamp && $(<"$stamp") == "$(<"$here/pom.xml")" ]]
}

if is_built; then
  print_jar
  exit
fi
command -v mvn >/dev/null ||
  fail "there is no Maven (mvn) to build the job server with: install it (on Debian and Ubuntu \`apt install maven\`)"
find "$cache" -maxdepth 1 -name 'job-server.new.*' -mmin +60 -exec rm -rf {} + # Of builds that were killed.
new=$(mktemp -d "$cache/job-server.new.XXXXXX") # Nobody's until it is whole; two builds at once do no harm.
trap 'rm -rf "$new"' EXIT
echo "Building the job server (once; a minute where the network is fast) ..." >&2
mvn --batch-mode --quiet --file "$here/pom.xml" -Dtarget="$new" package >&2 ||
  fail "Maven could not fetch the job server's libraries; behind a proxy, name it or your mirror in ~/.m2/settings.xml"
cp "$here/pom.xml" "$new/built-from"
if ! is_built; then
  rm -rf "$target"
  mv "$new" "$target"
fi
print_jar
