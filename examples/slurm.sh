#!/usr/bin/env bash
# Pretrain on several machines under Slurm: sbatch examples/slurm.sh [section.key=value ...]
# A job that is requeued or started again resumes. Fill in what stands between < and >.
#SBATCH --job-name=softmask
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1          # one torchrun per machine starts the processes
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=40           # shared by all processes and data-loader workers of a machine
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append           # keep the log of earlier starts
#SBATCH --output=softmask-%j.log
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:29500" \
    -m softmask_plugin.train \
    --cfg-path lavis_configs/projects/pretrain/train/pretrain_4m.yaml \
    --options run.output_dir="<a folder that all machines see>" \
    run.resume_ckpt_path=auto run.save_every_steps=1000 "$@"
