"""What a trained autoencoder is good for by itself: features, finding anomalies, removing noise, mixing and sampling."""

from latentae.tasks.denoising import denoise
from latentae.tasks.detecting import anomaly
from latentae.tasks.extracting import features
from latentae.tasks.interpolating import interpolate
from latentae.tasks.sampling import sample

__all__ = ["anomaly", "denoise", "features", "interpolate", "sample"]
