#!/bin/sh
# Keeps the model store of a pod's TorchServe at what the tag `production` points to.
#   follow.sh pull     before the server starts: the archive into the empty folder
#   follow.sh follow   beside it: every move of the tag is rolled out, without a request lost
set -eu
folder=${MODEL_STORE:-/models}

production() {
  manifest=$(marina store show "$MARINA_MODEL@production") || return 1
  printf '%s' "$manifest" | python -c 'import json, sys; print(json.load(sys.stdin)["id"])'
}

remember() {
  printf '%s' "$1" > "$folder/.followed.part"
  mv "$folder/.followed.part" "$folder/.followed"
}

if [ "$1" = pull ]; then
  # A pod that starts again has its archive, and needs no store.
  if [ -s "$folder/.followed" ]; then exit 0; fi
  id=$(production)
  marina store pull "$id" --output "$folder"
  remember "$id"
  exit 0
fi

trap 'exit 0' TERM INT
while :; do
  sleep "${FOLLOW_SECONDS:-30}" &
  wait $!
  # A store that cannot be reached, or an archive that is refused, leaves the server as it is.
  id=$(production) || continue
  if [ "$id" = "$(cat "$folder/.followed")" ]; then continue; fi
  if marina store deploy "$id" --store-dir "$folder" \
    --management http://127.0.0.1:8081 --inference http://127.0.0.1:8080; then
    remember "$id"
  fi
done
