#!/bin/sh
# Leaves the file `gpu` when there is a usable one in time. A Tekton pod of this step asks for a GPU, so that it is not
# even started without one; it is gone when this ends.
set -eu
rm -f gpu
if [ "$MARINA_DEVICE" = cpu ]; then
  echo "device is cpu: nothing to wait for"
  exit 0
fi

number=${MARINA_GPU_TIMEOUT%[smh]}
case $number in
  "" | *[!0-9]*)
    echo "gpu_timeout is $MARINA_GPU_TIMEOUT: give a number with s, m or h, such as 12m" >&2
    exit 1
    ;;
esac
case $MARINA_GPU_TIMEOUT in
  *h) seconds=$((number * 3600)) ;;
  *m) seconds=$((number * 60)) ;;
  *) seconds=$number ;;
esac
deadline=$(($(date +%s) + seconds))
while :; do
  python -c '
import os, sys
if not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg"))):
    sys.exit(2)
import torch
sys.exit(not torch.cuda.is_available())' && code=0 || code=$?
  if [ "$code" = 0 ]; then
    echo "a GPU is here"
    touch gpu
    exit 0
  fi
  # However long one waits.
  if [ "$code" = 2 ]; then
    echo "this machine has no NVIDIA driver: not waiting for a GPU"
    exit 0
  fi
  if [ "$(date +%s)" -ge "$deadline" ]; then
    echo "no GPU within $MARINA_GPU_TIMEOUT"
    exit 0
  fi
  sleep 5
done
