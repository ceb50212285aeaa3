#!/bin/sh
# Run a stage as a job of a Ray cluster, follow its log, and end with its exit code:
#
#   cluster/submit.sh finetune --config my.toml --set run.workers=8
#
# Needed: RAY_API_SERVER_ADDRESS (http://127.0.0.1:8265 through a tunnel) and the cluster's token,
# in ~/.ray/auth_token or where RAY_AUTH_TOKEN_PATH says. To resume, give the same command again.
# Ctrl-C lets the job save and stop (exit code 75); once more leaves it to itself.
set -eu
export RAY_API_SERVER_ADDRESS="${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}"
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
exec dpldm submit "$@"
