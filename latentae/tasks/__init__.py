"""One file per verb: features, anomaly, denoise, interpolate and sample."""
