#!/bin/sh
# The archive, which the servers of a cluster follow, and its run become `production`; a server that is named is updated
# at once.
set -eu
if [ "$MARINA_DEPLOY" != true ]; then
  echo "deploy is false: production stays what it was"
  exit 0
fi
if [ -n "$MARINA_S3_ENDPOINT" ]; then export AWS_ENDPOINT_URL="$MARINA_S3_ENDPOINT"; fi
id=$(cat archive.id)
if [ -n "${MARINA_SERVER_MANAGEMENT:-}" ]; then
  set -- --management "$MARINA_SERVER_MANAGEMENT" --inference "$MARINA_SERVER_INFERENCE" \
    --store-dir "$MARINA_SERVER_STORE_DIR"
  if [ -n "$MARINA_SERVER_TOKEN_FILE" ]; then set -- "$@" --token-file "$MARINA_SERVER_TOKEN_FILE"; fi
  marina store deploy "$id" "$@"
fi
marina store promote "$(cat run.id)" --kind runs --to production
marina store promote "$id" --to production
