#!/usr/bin/env bash
# Runs a command in an empty network namespace: no interface but loopback, which the tests of several processes use to
# talk to each other.
#
#     tests/without_network.sh python -m pytest
set -euo pipefail
exec unshare --user --map-root-user --net bash -c 'ip link set lo up && exec "$@"' without_network "$@"
