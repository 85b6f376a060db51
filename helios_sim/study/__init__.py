"""Studies: arms over a workload, swept over settings, run as jobs and assembled into one result."""
