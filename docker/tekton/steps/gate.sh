#!/bin/sh
# Ends the pipeline, before anything is pushed, unless every figure is reached, and those of the model that serves now.
set -euf
set -- --evaluation evaluation --require "$MARINA_REQUIRE"
if [ -n "$MARINA_LIVE" ]; then set -- "$@" --live live-evaluation --live-drop "$MARINA_LIVE_DROP"; fi
marina pipeline gate run "$@" > gate.txt 2>&1 || failed=$?
cat gate.txt
exit "${failed:-0}"
