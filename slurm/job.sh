# shellcheck shell=bash
# What every *.sbatch file here does: run stages of dpldm on all nodes of this job, pass on signals,
# requeue the job when that helps. Sourced with `stages` set and the user's arguments in "$@".
# All decisions are taken in Python (dpldm_dist/runtime/slurm.py); this file only calls Slurm.
: "${here:?is set by the *.sbatch files}" "${stages:?is set by the *.sbatch files}"

# ---- settings: give them to sbatch by --export=ALL,NAME=VALUE, or set them in hook.sh --------------
: "${DPLDM_MAX_REQUEUES:=20}"        # starts of a job, beyond the first
: "${DPLDM_BRING_UPS:=3}"            # tries to bring up Ray within a start
: "${DPLDM_START_TIMEOUT:=180}"      # s for all nodes to report and to join Ray, each
: "${DPLDM_STOP_GRACE:=90}"          # s to save, once asked to stop (below --signal=B:USR1@...)
: "${DPLDM_NODE_TIMEOUT:=30}"        # s of silence after which a node counts as lost
: "${DPLDM_FOLDER_FOR_RAY:=/tmp}"    # on every node's own disk; a short path
: "${DPLDM_INTERFACE:=}"             # network interface for Ray and the workers; empty: the default one
: "${DPLDM_HEAD_ADDRESS:=}"          # address of the first node; empty: that of its name
: "${DPLDM_DASHBOARD:=false}"        # true: Ray's dashboard, on the first node only
DPLDM_PYTHON=(python)                # how Python is called on a node
DPLDM_SRUN=()                        # more options of srun, such as --container-image=...
# shellcheck source=/dev/null
if [ -f "$here/hook.sh" ]; then . "$here/hook.sh"; fi   # modules, environments, containers
set -uo pipefail
export DPLDM_START_TIMEOUT DPLDM_STOP_GRACE DPLDM_NODE_TIMEOUT DPLDM_FOLDER_FOR_RAY
export DPLDM_INTERFACE DPLDM_HEAD_ADDRESS DPLDM_DASHBOARD PYTHONUNBUFFERED=1

tell() { echo "[job $SLURM_JOB_ID] $*"; }

asked='' step=''
ask() { # a warning came: of the time limit (USR1), or of the job's end, as by scancel (TERM)
  asked=$1
  if [ -n "$step" ]; then kill -s "$2" "$step" 2>/dev/null; fi   # srun hands it to every task
}
trap 'ask stop USR1' USR1
trap 'ask cancel USR2' TERM

on_this_node() {
  if [ ${#DPLDM_SRUN[@]} -gt 0 ]; then
    srun --nodes=1 --ntasks=1 "${DPLDM_SRUN[@]}" "${DPLDM_PYTHON[@]}" "$@"
  else
    "${DPLDM_PYTHON[@]}" "$@"
  fi
}

on_every_node() { # to be put into the background; its input reaches every task
  exec srun --export=ALL --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
    --ntasks-per-node=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    --mpi=none --kill-on-bad-exit=0 --wait=30 \
    ${DPLDM_SRUN[@]+"${DPLDM_SRUN[@]}"} "${DPLDM_PYTHON[@]}" "$@"
}

folder=$(on_this_node -m dpldm_dist.runtime.slurm begin "$stages" "$@") || exit

code=75 verdict=requeue   # if the warning came before anything began
for ((try = 1; try <= DPLDM_BRING_UPS; try++)); do
  if [ -n "$asked" ]; then break; fi
  on_every_node -m dpldm_dist.runtime.slurm node "$folder" "$try" \
    < <(od -An -vtx1 -N32 /dev/urandom | tr -d ' \n'; echo) &   # the token of this job's Ray
  step=$!
  while kill -0 "$step" 2>/dev/null; do wait "$step"; done   # a trapped signal ends a wait early
  step=''
  # No verdict: the first node, or Slurm's step on it, was lost.
  read -r code verdict 2>/dev/null <"$folder/verdict-$try" || { code=71 verdict=requeue; }
  if [ "$code" != 70 ]; then break; fi
  tell "Ray did not come up (try $try of $DPLDM_BRING_UPS)."
done

is_over() { [ "$asked" = cancel ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" != RUNNING ]; }

trap '' USR1 TERM
if [ "$verdict" = requeue ] && ! is_over; then
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "$DPLDM_MAX_REQUEUES" ]; then
    tell "Not requeued: DPLDM_MAX_REQUEUES=$DPLDM_MAX_REQUEUES is reached. To go on, submit again."
  elif scontrol requeue "$SLURM_JOB_ID"; then
    tell "Requeued (exit code $code)."
  else
    tell "Could not be requeued. To go on, submit again."
  fi
fi
exit "$code"
