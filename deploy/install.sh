#!/usr/bin/env bash
# Installs this package in the image, with the versions of constraints.txt; PyTorch from the index $1, where one is named.
set -euo pipefail

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

index=${1:-}
if [[ -z $index ]]; then
  pip install --no-cache-dir --constraint constraints.txt .
  pip check
  exit
fi

index=${index%/}
name=${index##*/}
case $name in
  cu[0-9][0-9][0-9]) cuda=${name:2:2}.${name:4} ;;
  cpu) cuda=None ;;
  *) fail "TORCH_INDEX=$index must end in cu126, in another version of CUDA, or in cpu" ;;
esac
version=$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' constraints.txt)
[[ $version =~ ^[0-9.]+$ ]] || fail "constraints.txt does not name one version of torch, but: $version"

# CUDA's packages are of another version there than constraints.txt says. The part behind `+` keeps PyPI's PyTorch away.
constraints=$(mktemp)
grep -Ev '^(torch==|triton==|cuda-|nvidia-)' constraints.txt >"$constraints"
echo "torch==$version+$name" >>"$constraints"
pip install --no-cache-dir --constraint "$constraints" --extra-index-url "$index" .
pip check
found=$(python -c 'import torch; print(torch.version.cuda)')
[[ $found == "$cuda" ]] || fail "the PyTorch of $index is for CUDA $found, not $cuda"
