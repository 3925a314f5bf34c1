#!/bin/bash
# The main job over the machines of a Slurm job, one `accelerate launch` on each; behind the script stand the arguments of llm-diffusion:
#   sbatch --nodes=8 examples/accelerate/slurm.sh --preset qwen3-4b --hyper-parameters-json '{"output_dir": "/shared/output"}'
# The output folder, and the hub's cache (HF_HOME), are on storage that all machines see. What the time limit stops goes on with --resume.
#SBATCH --job-name=llm-diffusion
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-.}"
export GPUS=${SLURM_GPUS_ON_NODE:-8}
read -r MAIN < <(scontrol show hostnames "$SLURM_JOB_NODELIST") # a pipe into `head` could fail, which ends the script
export MAIN PORT=$((20000 + SLURM_JOB_ID % 10000)) # two jobs on one machine do not meet

# Quoted once: SLURM_NODEID is each machine's own, and the arguments arrive as they were given.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch \
    --config_file examples/accelerate/multi-node.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * GPUS))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN" --main_process_port "$PORT" \
    -m llm_diffusion.main "$@"' llm-diffusion "$@"
