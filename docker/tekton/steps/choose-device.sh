#!/bin/sh
# What trains: the GPU that was waited for, or the CPU where that is allowed. Written to `device`.
set -eu
if [ -e gpu ]; then
  device=gpu
elif [ "$MARINA_DEVICE" = gpu ]; then
  echo "no usable GPU was found, and device is gpu: give more gpu_timeout than $MARINA_GPU_TIMEOUT where one may come, or allow the CPU with device=auto" >&2
  exit 1
else
  device=cpu
  if [ "$MARINA_DEVICE" = auto ]; then
    echo "WARNING: NO USABLE GPU: THE CPU TRAINS, all $MARINA_EPOCHS epochs; it takes long" >&2
  fi
fi
printf '%s' "$device" > device
if [ -n "${MARINA_RESULT:-}" ]; then printf '%s' "$device" > "$MARINA_RESULT"; fi
echo "$device"
