#!/usr/bin/env bash
# Pretrain on several machines under Slurm: sbatch examples/slurm.sh [section.key=value ...]
# Two minutes before its time is up, or when it has to make room, the run saves its step and ends
# with the code 75; the job then goes back into the queue, and resumes. A job that is started again
# by hand resumes as well. Fill in what stands between < and >.
#SBATCH --job-name=softmask
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8          # a process for each GPU; Slurm's signals reach them all
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=5            # with its data-loader workers
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120          # to this script; long enough for a step, an evaluation, a save
#SBATCH --requeue
#SBATCH --open-mode=append           # keep the log of earlier starts
#SBATCH --output=softmask-%j.log
set -uo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=29500

# shellcheck disable=SC2016  # each process has its own SLURM_PROCID
srun bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec "$@"' - \
    python -m softmask_plugin.train \
    --cfg-path lavis_configs/projects/pretrain/train/pretrain_4m.yaml \
    --options run.output_dir="<a folder that all machines see>" \
    run.resume_ckpt_path=auto run.save_every_steps=1000 "$@" &
run=$!
trap 'signalled=1; kill -USR1 "$run"' USR1 TERM
wait "$run"
code=$?
if [ -n "${signalled-}" ]; then # which ended the first wait
    wait "$run"
    code=$?
fi
if [ "$code" -eq 75 ]; then # nothing else: a mistake would fail again and again
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
