"""The output of a calibration: profile, trace, a ready experiment, summary, and one page with figures."""
