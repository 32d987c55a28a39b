#!/bin/sh
# Ends the pipeline, before anything is pushed, unless every figure is reached.
set -euf
marina pipeline gate run --evaluation evaluation --require "$MARINA_REQUIRE" > gate.txt 2>&1 || failed=$?
cat gate.txt
exit "${failed:-0}"
