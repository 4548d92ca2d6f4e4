#!/usr/bin/env bash
# ops/install.sh below a destdir, and the units it installs.
#   install_test.sh BINARY
set -euo pipefail
binary=$(realpath "$1")
tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
dest=$(mktemp -d)
trap 'rm -rf "$dest" "$dest.out"' EXIT
fail() { echo "FAILED: $*"; exit 1; }
install() { "$tree/ops/install.sh" --destdir "$dest" --binary "$binary" "$@"; }
mode() { stat -c %a "$dest$1"; }

install --dry-run >"$dest.out"
[ -z "$(ls -A "$dest")" ] || fail "--dry-run made something"

install >"$dest.out"
[ "$(mode /usr/local/bin/machina)" = 755 ] || fail "the program's mode"
[ "$(mode /etc/machina/token)" = 600 ] || fail "the token's mode"
[ "$(mode /var/lib/machina)" = 700 ] || fail "the root's mode"
[ "$(wc -c <"$dest/etc/machina/token")" -ge 32 ] || fail "the token is short"
! grep -qf "$dest/etc/machina/token" "$dest.out" || fail "the token was shown"
token=$(cat "$dest/etc/machina/token")

# Again: nothing changes, whatever was edited stays.
sed -i 's/^MACHINA_PORT: .*/MACHINA_PORT: 9999/' "$dest/etc/machina/machina.yaml"
inode=$(stat -c %i "$dest/usr/local/bin/machina")
install >"$dest.out"
[ "$(stat -c %i "$dest/usr/local/bin/machina")" = "$inode" ] || fail "replaced for nothing"
grep -q 9999 "$dest/etc/machina/machina.yaml" || fail "the configuration was overwritten"
[ "$(cat "$dest/etc/machina/token")" = "$token" ] || fail "the token changed"

# An upgrade: replaced in one step, and it says how to go on.
printf '#!/bin/sh\necho machina 0.0.1\n' >"$dest/usr/local/bin/machina"
chmod 755 "$dest/usr/local/bin/machina"
install >"$dest.out"
cmp -s "$binary" "$dest/usr/local/bin/machina" || fail "not upgraded"
grep -q 'ops restart --pool' "$dest.out" || fail "no word on the restart"

# What is installed would start (but for paths below the destdir).
sed "s|/etc/machina|$dest/etc/machina|; s|MACHINA_ROOT: .*|MACHINA_ROOT: $dest/var/lib/machina|" \
  "$dest/etc/machina/machina.yaml" >"$dest/check.yaml"
env -i "$dest/usr/local/bin/machina" serve --config "$dest/check.yaml" --check ||
  fail "the configuration is refused"

# Another prefix, root and user are in the units.
install --prefix /opt/m --root /srv/m --user queue >/dev/null
unit=$dest/etc/systemd/system/machina.service
grep -q '^ExecStart=/opt/m/bin/machina serve' "$unit" || fail "the prefix"
grep -q '^ReadWritePaths=/srv/m$' "$unit" || fail "the root"
grep -q '^User=queue$' "$unit" || fail "the user"

for bad in '--prefix relative' '--root /a|b' '--user Root!' '--what'; do
  # shellcheck disable=SC2086
  install $bad >/dev/null 2>&1 && fail "accepted $bad" || [ $? = 2 ] ||
    fail "$bad is not usage"
done

if command -v systemd-analyze >/dev/null; then
  mkdir "$dest/verify"
  for unit in machina machina-pool; do
    sed "s|/usr/local/bin/machina|$binary|" \
      "$dest/usr/local/lib/systemd/system/$unit.service" >"$dest/verify/$unit.service"
  done
  said=$(systemd-analyze verify "$dest"/verify/*.service 2>&1) || fail "systemd-analyze: $said"
  ! grep -E "machina(-pool)?\.service" <<<"$said" || fail "systemd-analyze warns"
  # A word that systemd does not know must be seen, or this shows nothing.
  echo "Nonsense=1" >>"$dest/verify/machina.service"
  systemd-analyze verify "$dest"/verify/*.service 2>&1 | grep -q Nonsense ||
    fail "systemd-analyze sees nothing"
else
  echo "SKIPPED in part: there is no systemd-analyze"
fi

install --uninstall >"$dest.out"
[ ! -e "$dest/usr/local/bin/machina" ] || fail "the program is left"
[ ! -e "$dest/usr/local/lib/systemd/system/machina.service" ] || fail "a unit is left"
[ -e "$dest/etc/machina/token" ] || fail "the configuration is gone"
[ -d "$dest/var/lib/machina" ] || fail "the data is gone"
rm -f "$dest.out"
echo "ops/install.sh does what it says"
