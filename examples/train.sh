#!/usr/bin/env bash
# A job from file to adapter with curl: HOLDFAST_KEY=… examples/train.sh FILE [MODEL]
set -euo pipefail
file=${1:?usage: train.sh FILE [MODEL]} model=${2:-SmolLM2-135M-Instruct}
url=${HOLDFAST_URL:-http://127.0.0.1:8080}
call() { curl --silent --show-error --fail-with-body --header "Authorization: Bearer ${HOLDFAST_KEY:?set HOLDFAST_KEY}" "$@"; }
field() { python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"; }

training=$(call --form purpose=fine-tune --form "file=@$file" "$url/v1/files" | field id)
job=$(call --json "{\"model\": \"$model\", \"training_file\": \"$training\"}" "$url/v1/fine_tuning/jobs" | field id)
echo "posted $job"
until status=$(call "$url/v1/fine_tuning/jobs/$job" | field status) && [[ $status =~ succeeded|failed|cancelled ]]; do sleep 2; done
echo "$status"
[[ $status == succeeded ]] || { call "$url/v1/fine_tuning/jobs/$job" | field error; exit 1; }
call "$url/v1/fine_tuning/jobs/$job/adapter" | tar --extract --verbose --one-top-level="$job"
