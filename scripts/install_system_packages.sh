#!/usr/bin/env bash
# Usage: install_system_packages.sh PACKAGE...
# Installs those of the named Debian packages that are missing. Where it may not, says in one line what to install.
# SKIP_APT=1: checks and installs nothing, for machines that have the same software from elsewhere.
set -euo pipefail

if [[ "${SKIP_APT:-}" == 1 ]]; then
  exit 0
fi
if ! command -v dpkg-query >/dev/null; then
  echo "error: not a Debian system: install what these packages hold: $* (then: make SKIP_APT=1 ...)" >&2
  exit 1
fi

missing=()
for package in "$@"; do
  status=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null) || true
  [[ "$status" == installed ]] || missing+=("$package")
done
if ((${#missing[@]} == 0)); then
  exit 0
fi

if ((EUID == 0)); then
  as_root=(env)
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
  as_root=(sudo -n env)
else
  echo "error: missing Debian packages; as root: apt-get install ${missing[*]} (or, with the same from elsewhere: make SKIP_APT=1 ...)" >&2
  exit 1
fi

echo "-- installing Debian packages: ${missing[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() { "${as_root[@]}" DEBIAN_FRONTEND=noninteractive apt-get --quiet=2 "$@" >>"$log" 2>&1; }
if ! { apt update && apt install --yes --no-install-recommends "${missing[@]}"; }; then
  tail -n 20 "$log" >&2
  echo "error: apt-get could not install ${missing[*]}" >&2
  exit 1
fi
