#!/usr/bin/env bash
# Whatever a run lacks to go on: a TPU, the package on it, the command running.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<END
resume.sh --name NAME --zone ZONE --type TYPE [--watch [--delete]] [OPTION...] -- COMMAND...
Create the TPU if there is none or it was preempted, set it up and test it (as smoke.sh) if it is bare, start the command if
it does not run. With
--watch: again and again, until the command has ended for good. The first start may be this, too. With --delete: then the
TPU is deleted, whatever the reason: done, bad input, too many crashes, a TPU that does not come. Ctrl-C ends the watching,
not the run, and deletes nothing; nor does stop.sh, after which the watch ends with 4.

The command's exit code decides: 0 done; 2 bad input, 3 a guard and 6 no room to write are not started again, and are this
script's exit code; 4 (interrupted, and saved) is started again; so is any other, a crash, but up to --crashes times in all
(TPU_CRASHES, default 3; creating, setting up or starting that fails counts too), then this script's is 1.

$OPTION_HELP
END
}

place_options "watch delete crashes" "$@"
check_type
check_source
need_command
: "${opt[crashes]:=3}"
[[ ${opt[crashes]} =~ ^[0-9]+$ ]] || die "--crashes: expected a number, got ${opt[crashes]}"
[[ -z ${opt[delete]} || -n ${opt[watch]} ]] || die "--delete expects --watch: it deletes when the watch has ended"

# delete_at_end : the TPU is gone when this returns; 1 and a warning if that cannot be reached.
delete_at_end() {
  local try
  for try in 1 2 3 4 5; do
    if NOW=$(state) && { [[ $NOW == ABSENT && -z ${opt[dry-run]} ]] || delete_tpu; }; then return 0; fi
    say "deleting ${opt[name]} failed (try $try of 5)"
    pause
  done
  say "${opt[name]} COSTS until delete.sh succeeds"
  return 1
}

# at_exit CODE : however the watch ends, no slice is left that nobody uses.
at_exit() {
  local code=$1
  set +e
  if [[ -n ${opt[delete]} ]] && ! delete_at_end && ((code == 0)); then code=1; fi
  rm -rf "$WORK"
  exit "$code"
}
trap 'at_exit $?' EXIT

interrupted() {
  trap - EXIT
  rm -rf "$WORK"
  echo "$PROGRAM: the watch ends; the run goes on, and the TPU costs until delete.sh" >&2
  exit 130
}
trap interrupted INT TERM HUP

# ensure_ready : a TPU that can be used, whatever stands there now.
ensure_ready() {
  until wait_until_ready; do
    if [[ $NOW != ABSENT ]]; then
      say "${opt[name]} is $NOW: deleting what is left of it"
      delete_tpu || failed "deleting failed"
    fi
    create_tpu || {
      failed "creating failed"
      pause
    }
  done
}

# summary : one word for all workers' answers (stdin): running, bare, none, unreachable, or the exit code that counts.
summary() {
  local word
  local -A seen=()
  while read -r word; do seen[$word]=1; done < <(sed -n 's/^tsopsd-status \(..*\)/\1/p')
  for word in running 2 3 6 bare stopped none; do
    [[ -z ${seen[$word]:-} ]] || { echo "$word" && return; }
  done
  for word in "${!seen[@]}"; do
    [[ $word == [04] ]] || { echo "$word" && return; }
  done
  [[ -z ${seen[4]:-} ]] || { echo 4 && return; }
  if [[ -n ${seen[0]:-} ]]; then echo 0; else echo unreachable; fi
}

# workers_say : that word, asked of the workers; unreachable also if one of them could not be asked.
workers_say() {
  local answers
  if [[ -n ${opt[dry-run]} ]]; then
    on_workers "$STATUS"
    echo bare
  elif answers=$(on_workers "$STATUS"); then
    summary <<<"$answers"
  else
    echo unreachable
  fi
}

STATUS="if [ -x tsopsd/code/tpu/worker.sh ]; then tsopsd/code/tpu/worker.sh status ${COMMAND[*]@Q}; \
else echo tsopsd-status bare; fi"

# failed WHAT : count a failure; give up after too many.
failures=0
failed() {
  ((++failures <= opt[crashes])) || {
    say "$1, as $((failures - 1)) times before; giving up (logs.sh may say why; delete.sh ends the costs)"
    exit 1
  }
  say "$1 ($failures of ${opt[crashes]})"
}

last='' begun='' tested='' silent=0 # begun: the command has run; tested: the slice has passed the smoke test

test_and_start() { { [[ -n $tested ]] || smoke_workers; } && tested=1 && start_command && begun=1; }

while true; do
  ensure_ready
  word=$(workers_say) bad=
  case $word in
    running)
      begun=1
      [[ $last == running ]] || say "the command is running"
      ;;
    unreachable)
      bad="not all workers answered" && say "$bad"
      # A fresh VM takes a while to let ssh in. One that never does costs all the same.
      [[ -n $begun ]] || ((++silent < 20)) || {
        say "no answer in $silent tries; giving up (ssh-add? a firewall?)"
        exit 1
      }
      ;;
    0)
      say "done; delete.sh ends the costs"
      exit 0
      ;;
    2)
      say "the command ended with 2: bad input (logs.sh says what); mend it, then run.sh"
      exit 2
      ;;
    3)
      say "the command ended with 3: a guard stopped the run (logs.sh says why); then run.sh"
      exit 3
      ;;
    6)
      say "the command ended with 6: it could not write (logs.sh says what: a full disk?); make room, then run.sh"
      exit 6
      ;;
    bare)
      tested=''
      { setup_workers && test_and_start; } || bad="setting up, testing or starting failed"
      ;;
    none)
      [[ -z $begun ]] || failed "the command ended without an exit code: killed, or a reboot"
      test_and_start || bad="testing or starting failed"
      ;;
    stopped)
      [[ -z $last ]] || {
        opt[delete]=''
        say "stopped by stop.sh, and saved; the TPU is kept and costs; run.sh goes on"
        exit 4
      }
      start_command || bad="starting failed"
      ;;
    4) start_command || bad="starting failed" ;;
    *)
      failed "the command crashed with exit code $word"
      start_command || bad="starting failed"
      ;;
  esac
  [[ -z $bad || $word == unreachable ]] || failed "$bad"
  [[ -n ${opt[watch]} && -z ${opt[dry-run]} ]] || break
  last=$word
  pause
done
[[ -z $bad ]]
