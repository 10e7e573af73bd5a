#!/bin/sh
# Which build of torch this machine needs: rocm (a Strix Halo with its driver), cuda, or cpu.
# An argument is used in place of /, for tests.
root=${1:-}
nodes="$root/sys/class/kfd/kfd/topology/nodes"
if [ -e "$root/dev/kfd" ] && grep -qs 'gfx_target_version 110501' "$nodes"/*/properties; then
  echo rocm
elif [ -e "$root/proc/driver/nvidia/version" ]; then
  echo cuda
else
  echo cpu
fi
