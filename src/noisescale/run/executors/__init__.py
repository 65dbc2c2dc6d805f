"""Where trials that do not stack are trained: this machine's processes, Ray, Slurm."""
