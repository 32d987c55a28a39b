#!/bin/sh
# Asks a running server for health, one prediction and one refused bad image, with curl alone.
#   sh tools/smoke.sh URL MODEL IMAGE [TOKEN]
# Prints a line for each; ends with 1 at the first wrong answer, with 2 for a wrong call.
set -u

if [ $# -lt 3 ] || [ $# -gt 4 ]; then
    echo "usage: sh tools/smoke.sh URL MODEL IMAGE [TOKEN]" >&2
    exit 2
fi
url=${1%/} model=$2 image=$3 token=${4-}
if [ ! -r "$image" ]; then
    echo "smoke: $image cannot be read" >&2
    exit 2
fi
if ! command -v curl >/dev/null; then
    echo "smoke: curl is not installed" >&2
    exit 2
fi

folder=$(mktemp -d) || exit 2
trap 'rm -rf "$folder"' EXIT
trap 'exit 1' HUP INT TERM
# The token goes to curl by a file: arguments can be seen by every user of the machine.
: >"$folder/curlrc"
chmod 600 "$folder/curlrc"
if [ -n "$token" ]; then
    printf 'header = "Authorization: Bearer %s"\n' "$token" >"$folder/curlrc"
fi

# ask WHAT PATTERN CURL-ARGUMENTS...: the status must match PATTERN; the body is left in $folder/body.
ask() {
    what=$1 pattern=$2
    shift 2
    : >"$folder/body"
    # TorchServe resets the connection after an answer from 400 up. curl may call that an error (56) when
    # the answer is there already: the status tells.
    status=$(curl -sS --max-time 60 -K "$folder/curlrc" -o "$folder/body" -w '%{http_code}' "$@" 2>"$folder/error")
    body=$(tr -s ' \n\t' '   ' <"$folder/body" | cut -c 1-200)
    if ! printf '%s' "$status" | grep -Eqx "$pattern"; then
        echo "smoke: $what: status $status, expected $pattern: $body$(cat "$folder/error")" >&2
        exit 1
    fi
}

ask health 200 "$url/ping"
echo "ok  health: $body"

# Marina's archives answer in other shapes too; others ignore the header.
ask prediction 200 -H 'Marina-Format: torchserve' -H 'Content-Type: image/jpeg' --data-binary "@$image" "$url/predictions/$model"
case $body in
'['* | ' ['*) echo "ok  prediction: $body" ;;
*)
    echo "smoke: prediction: no JSON list: $body" >&2
    exit 1
    ;;
esac

ask refusal '400|415' -H 'Content-Type: image/jpeg' --data-binary 'this is no picture' "$url/predictions/$model"
for field in code type message; do
    if ! grep -q "\"$field\"" "$folder/body"; then
        echo "smoke: refusal: no \"$field\" in $body" >&2
        exit 1
    fi
done
echo "ok  refusal: $status $body"
