#!/bin/sh
# Runs an element of hydra/launcher=slurm, which fills in its values. Slurm's signals end an element that is loading
# Python: this shell then requeues it, as often as a job is started again without progress. $starting says that the
# element handles no signals yet; it removes the file (dlopt.sweeps.slurm.note_start).
trap : USR1 TERM
job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
starting=%(folder)s/%(starting)s$job
echo >>"$starting"
%(command)s
code=$?
case $code in 138 | 143) ;; *) exit $code ;; esac
[ -e "$starting" ] && [ "$(wc -l <"$starting")" -le %(requeue)s ] || exit $code
# Cancelled by the user, not preempted. If the controller does not respond, the element counts as not cancelled.
state=$(squeue --noheader --jobs="$job" --format=%%T/%%r) && [ -z "$state" ] && exit $code
case $state in CANCELLED/* | COMPLETING/None) exit $code ;; esac
scontrol requeue "$job" && sleep 60 # the requeue kills this script
exit $code
