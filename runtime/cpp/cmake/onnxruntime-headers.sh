#!/bin/sh
# Unpacks the headers of Debian 13's libonnxruntime-dev into FOLDER, on any Debian, without touching its own sources:
#   cmake/onnxruntime-headers.sh FOLDER && cmake --preset release -DONNXRUNTIME_ROOT=FOLDER
set -eu
folder=${1:?usage: onnxruntime-headers.sh FOLDER}
if [ -n "$(find "$folder" -name onnxruntime_c_api.h 2>/dev/null)" ]; then exit 0; fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mirror=$(apt-get indextargets --format '$(REPO_URI) $(ORIGIN)' 'Created-By: Packages' | awk '$2 == "Debian" {print $1; exit}')
if [ -z "$mirror" ]; then
  echo "onnxruntime-headers.sh: apt knows no Debian mirror yet; expected one: run apt-get update" >&2
  exit 1
fi
mkdir -p "$work/sources" "$work/lists/partial" "$work/cache/archives/partial"
cat > "$work/sources/trixie.sources" <<SOURCES
Types: deb
URIs: $mirror
Suites: trixie
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
SOURCES
apt() {
  apt-get -qq -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$work/sources" -o Dir::State::lists="$work/lists" \
    -o Dir::Cache="$work/cache" -o Debug::NoLocking=1 -o APT::Sandbox::User= "$@"
}
apt update
(cd "$work" && apt download libonnxruntime-dev)
mkdir -p "$folder"
dpkg-deb --extract "$work"/libonnxruntime-dev_*.deb "$folder"
