#!/usr/bin/env bash
# The container of strixft, with the GPU: build, create, enter, update, lab, remove.
#
#   container/toolbox.sh build     make the image from container/Containerfile
#   container/toolbox.sh create    make a toolbox of it (home folder shared, packages not)
#   container/toolbox.sh enter     a shell in it; or: enter COMMAND …
#   container/toolbox.sh update    build again from newer packages, and create again
#   container/toolbox.sh lab       JupyterLab on 127.0.0.1 as a service (podman, systemd)
#   container/toolbox.sh remove    delete the toolbox; the home folder stays
#
# Uses toolbox if it is there, else podman, else docker; STRIXFT_ENGINE=docker chooses.
# STRIXFT_DRY_RUN=1 prints the commands instead of running them.
set -euo pipefail

IMAGE=${STRIXFT_IMAGE:-localhost/strixft:latest}
NAME=${STRIXFT_NAME:-strixft}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
UNITS=${XDG_CONFIG_HOME:-$HOME/.config}/containers/systemd

# What a container needs to reach the GPU (kyuz0/amd-strix-halo-llm-finetuning: README.md).
GPU=(--device /dev/kfd --device /dev/dri --group-add video --group-add render
  --security-opt "seccomp=unconfined")

run() {
  if [[ -n ${STRIXFT_DRY_RUN:-} ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

fail() {
  printf '%s\nfix: %s\n' "$1" "$2" >&2
  exit 1
}

engine() {
  local name
  for name in ${STRIXFT_ENGINE:-toolbox podman docker}; do
    if command -v "$name" >/dev/null; then
      printf '%s\n' "$name"
      return
    fi
  done
  fail "neither toolbox nor podman nor docker is installed" "sudo dnf install toolbox | sudo apt install podman-toolbox | sudo pacman -S toolbox"
}

builder() {
  if [[ $ENGINE == docker ]]; then echo docker; else echo podman; fi
}

build() {
  run "$(builder)" build "$@" --file "$HERE/Containerfile" --tag "$IMAGE" "$HERE/.."
}

create() {
  if [[ ! -e /dev/kfd && -z ${STRIXFT_DRY_RUN:-} ]]; then
    fail "this machine has no /dev/kfd" "strixft doctor   on the host says why"
  fi
  case $ENGINE in
    toolbox) run toolbox create --image "$IMAGE" "$NAME" -- "${GPU[@]}" ;;
    podman) run podman create --name "$NAME" --interactive --tty --userns keep-id \
      --group-add keep-groups --device /dev/kfd --device /dev/dri \
      --security-opt seccomp=unconfined --security-opt label=disable --network host \
      --volume "$HOME:$HOME" --workdir "$HOME" --env "HOME=$HOME" "$IMAGE" bash --login ;;
    docker) run docker create --name "$NAME" --interactive --tty \
      --user "$(id -u):$(id -g)" --group-add "$(group_number video)" \
      --group-add "$(group_number render)" --device /dev/kfd --device /dev/dri \
      --security-opt seccomp=unconfined --network host \
      --volume "$HOME:$HOME" --workdir "$HOME" --env "HOME=$HOME" "$IMAGE" bash --login ;;
  esac
}

# docker knows the groups of the image; the devices belong to those of the host.
group_number() {
  getent group "$1" | cut -d: -f3
}

enter() {
  if [[ $ENGINE == toolbox ]]; then
    if (($#)); then
      run toolbox run --container "$NAME" "$@"
    else
      run toolbox enter "$NAME"
    fi
    return
  fi
  run "$ENGINE" start "$NAME"
  if (($#)); then
    run "$ENGINE" exec --interactive --tty "$NAME" "$@"
  else
    run "$ENGINE" exec --interactive --tty "$NAME" bash --login
  fi
}

remove() {
  if [[ $ENGINE == toolbox ]]; then
    run toolbox rm --force "$NAME"
  else
    run "$ENGINE" rm --force "$NAME"
  fi
}

update() {
  build --pull --no-cache
  remove || true
  create
}

lab() {
  run mkdir -p "$UNITS"
  run cp "$HERE/strixft-lab.container" "$UNITS/"
  if [[ -n ${STRIXFT_DRY_RUN:-} ]] || ! podman secret exists strixft-token; then
    run sh -c 'head -c 24 /dev/urandom | base64 | tr -d "/+=" | podman secret create strixft-token -'
  fi
  run systemctl --user daemon-reload
  run systemctl --user start strixft-lab
  echo "http://127.0.0.1:8888/lab   token: podman secret inspect --showsecret strixft-token"
}

usage() {
  sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

command=${1:-help}
shift || true
case $command in
  build | create | enter | update | lab | remove)
    ENGINE=$(engine)
    "$command" "$@"
    ;;
  help | --help | -h) usage ;;
  *) fail "there is no command '$command'" "container/toolbox.sh help" ;;
esac
