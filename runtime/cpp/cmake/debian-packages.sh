#!/bin/sh
# Installs what building and testing libtarflow needs from Debian's packages, or those that are named; does nothing if it
# is all there.
set -eu
libtarflow="g++ cmake ninja-build pkg-config nlohmann-json3-dev libssl-dev doctest-dev libcpp-httplib-dev libpng-dev clang libclang-rt-dev"
missing=""
for package in ${*:-$libtarflow}; do
  if ! dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q "ok installed"; then missing="$missing $package"; fi
done
if [ -z "$missing" ]; then exit 0; fi
if [ "$(id -u)" != 0 ]; then
  echo "this needs packages that are not installed here, and only root can install them; type:" >&2
  echo "  sudo apt-get install --no-install-recommends$missing" >&2
  exit 1
fi
apt-get update -qq
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing > /dev/null
