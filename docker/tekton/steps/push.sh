#!/bin/sh
# Archive and run go into the store with the figures that they reached; the archive becomes `latest`.
set -euf
if [ -n "$MARINA_S3_ENDPOINT" ]; then export AWS_ENDPOINT_URL="$MARINA_S3_ENDPOINT"; fi

push() {
  what=$1
  shift
  if [ ! -s "$what.id" ]; then
    marina store push "$@" > "$what.id.part"
    mv "$what.id.part" "$what.id"
  fi
}

what=$MARINA_REQUIRE
set --
IFS=,
for figure in $what; do set -- "$@" --require "$figure"; done
unset IFS

push run run --name "$MARINA_MODEL_NAME" --evaluation evaluation "$@"
push archive archive.mar --evaluation evaluation "$@"
marina store promote "$(cat run.id)" --kind runs --to latest
marina store promote "$(cat archive.id)" --to latest
