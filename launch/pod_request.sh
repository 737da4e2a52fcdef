#!/usr/bin/env bash
# Sourced by launch/pod.sh: asking for a TPU, waiting for it, deleting it. Options are its variables.
# shellcheck disable=SC2154

delete=("${queued[@]}" delete "$name" "${where[@]}" --force --quiet)
# remove: delete the request and its TPUs; the record stays when that fails.
remove() {
  local text
  if [ "$dry_run" = 1 ]; then
    show "${delete[@]}"
    return
  fi
  if text="$("${delete[@]}" 2>&1)" || [[ "${text,,}" == *"not found"* || "$text" == *NOT_FOUND* ]]; then
    rm -f "$record"
    say "$name is deleted"
  else
    say "${text//$'\n'/ }"
    say "could not delete it; it costs until you do: $(show "${delete[@]}")"
    return 1
  fi
}

state_of() {
  "${queued[@]}" describe "$name" "${where[@]}" --format='value(state.state)'
}

# ask: send the request once. Returns 0, or 1 after a stock-out; ends the program otherwise.
ask() {
  local create=("${queued[@]}" create "$name") text status=0
  if [ "$tier" = flex ]; then create=(gcloud alpha compute tpus queued-resources create "$name"); fi
  create+=("${where[@]}" --accelerator-type="$type" --runtime-version="$runtime")
  if [ "$slices" -gt 1 ]; then
    create+=(--node-count="$slices" --node-prefix="$name")
  else
    create+=(--node-id="$name")
  fi
  case "$tier" in
    spot) create+=(--spot) ;;
    reserved) create+=(--reserved) ;;
    flex) create+=(--provisioning-model=flex-start --max-run-duration="$max_run") ;;
  esac
  if [ -n "$valid_until" ]; then create+=(--valid-until-duration="$valid_until"); fi
  create+=("${create_flags[@]}" --quiet)
  # A TPU that was taken away is requested as it was before, whatever the options are now.
  if [ "${#requested[@]}" -gt 0 ]; then create=("${requested[@]}"); fi
  if [ "$dry_run" = 1 ]; then
    show "${create[@]}"
    return 0
  fi
  mkdir -p "$records"
  printf '%s\0' "${create[@]}" >"$record"
  text="$("${create[@]}" 2>&1)" || status=$?
  [ "$status" -ne 0 ] || return 0
  refused "$text"
}

# refused TEXT: 1 when the request may be sent again; ends the program otherwise.
refused() {
  local line="${1//$'\n'/ }"
  case "${line,,}" in
    *"already exists"*)
      # Not this script's: it must not be deleted at the end.
      rm -f "$record"
      die "$name exists already in $zone: use another --name, or --existing"
      ;;
    *quota*)
      rm -f "$record"
      die "no quota for $type in $zone: $line"
      ;;
    *"no more capacity"* | *stockout* | *stock-out* | *resource_exhausted* | *resource_pool_exhausted* | \
      *"not enough"* | *"insufficient capacity"* | *unavailable* | *"allocation interval"*)
      say "no $type is free in $zone: $line"
      return 1
      ;;
  esac
  say "error: $line"
  exit 1
}

# await_tpu: 0 when the TPU is there, 1 when the request has failed for want of chips.
await_tpu() {
  local state last="" reason failures=0
  while :; do
    if ! state="$(state_of 2>&1)"; then
      failures=$((failures + 1))
      [ "$failures" -lt 5 ] || { say "error: gcloud does not answer: ${state//$'\n'/ }" && exit 1; }
      sleep "$poll"
      continue
    fi
    failures=0
    [ "$state" = "$last" ] || say "$name: $state"
    last="$state"
    case "$state" in
      ACTIVE) return 0 ;;
      FAILED)
        reason="$("${queued[@]}" describe "$name" "${where[@]}" \
          --format='value(state.failedData.error.message)' 2>&1)" || true
        # It stays in the queue until it is deleted, and would take its name.
        remove || exit 1
        refused "${reason:-without a reason}" || return 1
        ;;
      SUSPENDING | SUSPENDED)
        say "$name was taken away before it was used"
        remove || exit 1
        return 1
        ;;
    esac
    sleep "$poll"
  done
}

# shellcheck disable=SC2317,SC2329
abandon() {
  local status=$?
  trap - EXIT INT TERM HUP
  if [ "$1" != EXIT ]; then status=130; fi
  if [ -f "$record" ] && [ "$is_up" = 0 ]; then
    say "deleting the request: $(show "${delete[@]}")"
    remove || true
  fi
  exit "$status"
}

up() {
  local pause="${PRISM_RETRY_SECONDS:-60}" try
  if [ "$existing" = 1 ]; then
    run "${vm[@]}" describe "$name" "${where[@]}" --format='value(state)'
    return
  fi
  if [ "$dry_run" = 1 ]; then
    ask
    show "${queued[@]}" describe "$name" "${where[@]}" --format='value(state.state)'
    return
  fi
  if [ -f "$record" ]; then
    say "$name was asked for before"
    if [ "$(state_of)" = ACTIVE ]; then return; fi
  fi
  is_up=0
  trap 'abandon EXIT' EXIT
  trap 'abandon INT' INT TERM HUP
  for ((try = 0; ; try++)); do
    if { [ -f "$record" ] || ask; } && await_tpu; then break; fi
    rm -f "$record"
    [ "$try" -lt "$retries" ] || { say "error: no $type in $zone after $((try + 1)) requests" && exit 1; }
    say "asking again in $pause s"
    sleep "$pause"
    pause=$((pause * 2 > 900 ? 900 : pause * 2))
  done
  is_up=1
  trap - EXIT INT TERM HUP
  say "$name is there: $slices x $type, $((slices * chips)) chips on $((slices * hosts)) hosts"
  say "delete it with: $(show bash launch/pod.sh down "${options[@]}")"
}
