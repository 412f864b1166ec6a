#!/usr/bin/env bash
# Builds the image in Cloud Build and writes the Flex Template that launches it; `--help` tells more.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)

usage() {
  cat <<'END'
usage: deploy/flex_template/build.sh --project P --image IMAGE --template gs://BUCKET/embed-corpus.json [OPTIONS]

  --project P         the project that builds
  --image IMAGE       where the image is pushed: REGION-docker.pkg.dev/P/REPOSITORY/embed-corpus:TAG
  --template URL      where the template is written; needs `gcloud`, logged in
  --python VERSION    of the image, 3.10 to 3.13; default: that of .venv, from which jobs are submitted, and 3.11 where
                      there is none. Jobs submitted without the template must come from the same version
  --torch_index URL   where PyTorch comes from instead of PyPI: https://download.pytorch.org/whl/cu126, or of another
                      version of CUDA, or .../cpu
  --template_only     the image is there already
  --dry_run           print the commands, run none
END
}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# Prints the version of the Python that submits jobs, where there is one.
default_python() {
  local version=''
  if [[ -x $root/.venv/bin/python ]]; then
    version=$("$root/.venv/bin/python" -E -S -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
      fail "$root/.venv/bin/python does not run: name the image's Python with --python, or run ./launch.sh again"
  fi
  if [[ $version =~ $pythons ]]; then echo "$version"; else echo 3.11; fi
}

pythons='^3\.1[0-3]$'
project='' image='' template='' python='' torch_index='' template_only='' dry_run=''
while (($#)); do
  case $1 in
    --project | --image | --template | --python | --torch_index)
      (($# > 1)) || fail "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    --project=* | --image=* | --template=* | --python=* | --torch_index=*)
      option=${1%%=*}
      printf -v "${option#--}" '%s' "${1#*=}"
      ;;
    --template_only | --dry_run) printf -v "${1#--}" yes ;;
    -h | --help)
      usage
      exit
      ;;
    *) fail "unknown option $1; --help lists them" ;;
  esac
  shift
done
[[ $project && $image && $template ]] || fail "--project, --image and --template are needed; --help tells more"
[[ $image == *:* ]] || fail "--image $image needs a tag: workers keep running the image they were started with"
[[ $template == gs://*/*.json ]] || fail "--template $template is not of the form gs://BUCKET/NAME.json"
[[ $python ]] || python=$(default_python)
[[ $python =~ $pythons ]] || fail "--python $python is not one of 3.10, 3.11, 3.12, 3.13"
[[ -z $torch_index || $torch_index =~ /(cpu|cu[0-9]{3})/?$ ]] ||
  fail "--torch_index $torch_index does not end in /cu126, in another version of CUDA, or in /cpu"

run() {
  if [[ $dry_run ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

if [[ ! $template_only ]]; then
  run gcloud builds submit "$root" --project="$project" --config="$root/deploy/flex_template/cloudbuild.yaml" \
    --substitutions="_IMAGE=$image,_PYTHON_VERSION=$python,_TORCH_INDEX=$torch_index"
fi
run gcloud dataflow flex-template build "$template" --project="$project" --image="$image" --sdk-language=PYTHON \
  --metadata-file="$root/deploy/flex_template/metadata.json"
