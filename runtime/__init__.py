"""Plans and their execution on the CPU: memory, threads, shape binding, profiling."""
