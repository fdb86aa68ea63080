"""The machine: device, threads, memory, CUDA graphs."""
