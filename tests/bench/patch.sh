#!/bin/bash
# tests/bench/patch.sh: what patch.apply adds to git and the tests.
#
# One good patch on Debian's toolz, tests before and after, pushed: JOBS jobs one
# after another through the whole queue, and the same commands by hand (clone,
# apply, commit, bundle, tests twice, fetch into the repository), taking turns.
# Overhead = the medians' difference. Target: at most 300 ms a job. As whoever runs
# it. Without tests the same is shown for git's part alone.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
rounds=${ROUNDS:-5}
need git git
need jq jq
package=/usr/lib/python3/dist-packages/toolz
[[ -d $package ]] || fail "toolz is missing: apt-get install python3-toolz"
[[ -x $machina ]] || fail "$machina is missing: build the release preset"
[[ $reference_only = 1 ]] || start_machina 1

repos=$dir/root/repos  # what counts as a repository root without saying so
mkdir -p "$repos"
base=$repos/toolz
mkdir "$base"
cp -r "$package" "$base/"
find "$base" -name __pycache__ -prune -exec rm -rf {} +
git -C "$base" init -q -b main
git -C "$base" add -A
git -C "$base" -c user.name=b -c user.email=b@localhost commit -qm installed
git clone -q "$base" "$dir/edit"
sed -i 's/^from .itertoolz/from toolz.itertoolz/' "$dir/edit/toolz/recipes.py"
git -C "$dir/edit" diff >"$dir/good.diff"
select=toolz/tests/test_recipes.py
now() { echo $(($(date +%s%N) / 1000)); }

by_hand() {  # by_hand N TESTS: microseconds
  local start work=$dir/hand.$1
  start=$(now)
  (
    cd "$dir"
    git clone -q --shared "$base" "$work"
    cd "$work"
    [[ $2 = 0 ]] || /usr/bin/python3 -m pytest -q -p no:cacheprovider --junitxml=../before.xml $select >/dev/null
    git apply --index ../good.diff
    git -c user.name=b -c user.email=b@localhost commit -qm patch
    git bundle create -q ../hand.bundle HEAD^..HEAD
    git diff -R HEAD^ HEAD >../reverse.diff
    [[ $2 = 0 ]] || /usr/bin/python3 -m pytest -q -p no:cacheprovider --junitxml=../after.xml $select >/dev/null
    git push -q origin "HEAD:refs/heads/hand/$1-$2"
  ) || fail "by hand: it failed"
  took=$(($(now) - start))
  rm -rf "$work"
}

through_machina() {  # through_machina TESTS: microseconds
  local body start answer
  body=$(jq -n --rawfile d "$dir/good.diff" --arg s "$select" --argjson t "$1" \
    '{kind:"patch.apply",max_attempts:1,payload:({repo:"toolz",diff:$d,push:true}
      + if $t == 1 then {test:{select:[$s]}} else {} end)}')
  start=$(now)
  answer=$(curl -sS -H "Authorization: Bearer $token" -H 'Prefer: wait=120' \
    -H 'Content-Type: application/json' -d "$body" \
    "http://127.0.0.1:$machina_port/v1/jobs")
  took=$(($(now) - start))
  [[ $(jq -r .result.outcome <<<"$answer") = applied ]] || fail "machina: $answer"
}

for tests in 0 1; do
  hand=() ours=()
  for ((i = 0; i <= rounds; i++)); do
    by_hand "$i" "$tests"
    [[ $i = 0 ]] || hand+=("$took")  # the first warms both sides
    [[ $reference_only = 1 ]] && continue
    through_machina "$tests"
    [[ $i = 0 ]] || ours+=("$took")
  done
  h=$(median "${hand[@]}")
  what="with tests before and after"
  [[ $tests = 1 ]] || what="without tests"
  if [[ $reference_only = 1 ]]; then
    echo "patch, $what: by hand $((h / 1000)) ms"
  else
    m=$(median "${ours[@]}")
    echo "patch, $what: machina $((m / 1000)) ms, by hand $((h / 1000)) ms," \
      "overhead $(((m - h) / 1000)) ms (target: at most 300 ms), $rounds rounds, medians"
  fi
done
