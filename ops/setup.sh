#!/usr/bin/env bash
# ops/setup.sh: installs the Debian 12 packages that building, running and
# testing need. Does nothing, and needs no network, when all are there. It has
# no options but --help.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
no_options "$@"

build=(g++ cmake ninja-build pkg-config ccache
  libuv1-dev liburing-dev node-llhttp libsqlite3-dev libxxhash-dev nlohmann-json3-dev
  libseccomp-dev libcurl4-openssl-dev libssl-dev libexpat1-dev libyaml-cpp-dev
  libcli11-dev)
# systemd: for systemd-analyze, which checks ops/systemd/; prometheus: for
# promtool, which tests ops/prometheus/; curl: for docs/operating.md
tests=(libgtest-dev libgmock-dev systemd prometheus curl)
run=(git python3 python3-pytest python3-networkx python3-toolz ca-certificates uidmap)

installed() {
  [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

command -v dpkg-query >/dev/null ||
  die "this needs Debian 12 (no dpkg here); docs/operating.md lists the libraries"

missing=()
for package in "${build[@]}" "${tests[@]}" "${run[@]}"; do
  installed "$package" || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
  say "all packages are there"
  exit 0
fi

apt=(apt-get)
if [ "$(id -u)" -ne 0 ]; then
  if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    apt=(sudo -n apt-get)
  else
    die "not root: have root run: apt-get install ${missing[*]}"
  fi
fi
say "installing: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
wait_for_lock=(-o DPkg::Lock::Timeout=120)
"${apt[@]}" "${wait_for_lock[@]}" -qq update ||
  die "apt-get update failed: is there a network and a package source?"
"${apt[@]}" "${wait_for_lock[@]}" -qq -y --no-install-recommends install \
  "${missing[@]}" >/dev/null ||
  die "apt-get install failed for: ${missing[*]}"
for package in "${missing[@]}"; do
  installed "$package" || die "$package is still missing"
done
say "installed"
