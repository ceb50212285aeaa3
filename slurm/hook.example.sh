# shellcheck shell=bash disable=SC2034
# Copy to hook.sh and keep what your cluster needs. job.sh sources it on the first node of a job.

# -- modules, and an environment in which this package is installed
# module load python/3.11 cuda
# source "$HOME/venvs/dpldm/bin/activate"         # or: conda activate dpldm

# -- a container by apptainer: Python is called inside of it on every node
# DPLDM_PYTHON=(apptainer exec --nv --bind "$PWD,/tmp" dpldm.sif python)

# -- a container by pyxis and enroot: srun starts it on every node
# DPLDM_SRUN=(--container-image="$PWD/dpldm.sqsh" --container-mounts="$PWD:$PWD,/tmp:/tmp" --container-workdir="$PWD")

# -- the network of the workers, where the default one is slow
# DPLDM_INTERFACE=ib0
# export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5

# -- storage and budget of this cluster (see the settings in job.sh)
# DPLDM_FOLDER_FOR_RAY=/local
# DPLDM_MAX_REQUEUES=50
