#!/usr/bin/env bash
# Runs a command in an empty network namespace: no interface but loopback, which the tests of several processes use to
# talk to each other. Fails where the machine has no such namespaces.
#
#     tests/without_network.sh python -m pytest
set -euo pipefail
namespace=(--net)
# root needs no users of its own making, of which there would be one only
unshare --net true 2> /dev/null || namespace=(--user --map-root-user --net)
exec unshare "${namespace[@]}" bash -c 'ip link set lo up && exec "$@"' without_network "$@"
