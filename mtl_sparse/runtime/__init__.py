"""What every layer may use: errors, files, processes, log output, compile cache, CPU options."""
