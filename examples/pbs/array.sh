#!/bin/bash
# An array: the first task on a node stages, later ones find the tree there.
#PBS -J 0-7
#PBS -l select=1:ncpus=1
#PBS -l pyenv=science
#PBS -j oe

cd "$PBS_O_WORKDIR" || exit 1
python where.py "$PBS_ARRAY_INDEX"
